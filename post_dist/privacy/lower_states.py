"""What the layers below an adapter make of the examples, computed once for all steps.

Their weights are not tuned, and in front of a text stands a fixed prompt. So their output of an
example never changes.

Shapes: B examples, T tokens with those of the prompt, d width.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from post_dist.data.template import Batch
from post_dist.models.lower_block import count_layer_outputs, outputs_of, without_layers
from post_dist.models.tuning_task import TuningTask
from post_dist.privacy.micro_batches import micro_batches
from post_dist.privacy.plan import ONE_EXAMPLE, PrivacyPlan
from post_dist.runtime.distributed import World
from post_dist.runtime.stop import stop_requested, stopped
from post_dist.runtime.watchdog import phase

_LEAST_EPOCHS = 2.0
"""Reading all examples takes about as long as the lower layers take in one epoch of the steps."""
_MOST_BYTES = 8 << 30
"""Largest memory for the states. A model of a few GB is beside them."""


def are_kept(plan: PrivacyPlan, bytes_of_example: float) -> bool:
    """Return whether lower states save time and fit into memory.

    Declared numbers alone decide, because how long a run takes can be seen.

    Args:
        plan: the plan of the private run.
        bytes_of_example: memory of the states of one example of full length.
    """
    # How many texts the users have is not declared.
    if plan.unit != ONE_EXAMPLE:
        return False
    trials = plan.mean_trials or 1.0
    examples = plan.expected_batch_size / plan.sampling_probability
    epochs = trials * plan.steps * plan.sampling_probability
    return epochs >= _LEAST_EPOCHS and examples * bytes_of_example <= _MOST_BYTES


class LowerStates:
    """The outputs of the lower layers for all training examples of a task, in host memory.

    The micro-batches are those of the steps, so the outputs are those of the steps, bit for bit.

    Args:
        task: the model, the examples, and the prompt in front of them.
        layers: number of lower layers, 1 or more.
        sizes: number of examples in a micro-batch of each padded length.
        world: this process, alone.

    Raises:
        Interrupted: the run was asked to stop.
    """

    @torch.no_grad()
    def __init__(
        self, task: TuningTask, layers: int, sizes: Mapping[int, int], world: World
    ) -> None:
        self._model = task.model
        self._lower = range(layers)
        # Call this before any layer is replaced, because it runs the first one.
        self._num_outputs = count_layer_outputs(task.model)
        self._by_text: dict[bytes, torch.Tensor] = {}
        # Nothing above them is needed, so those layers are left out of the pass.
        upper = range(layers, len(task.model.layers))
        examples = range(len(task.examples))
        with (
            without_layers(task.model, upper, num_outputs=self._num_outputs),
            outputs_of(task.model, layers - 1) as outputs,
        ):
            for micro_batch in micro_batches(task, examples, sizes, world.device):
                # This tells the watchdog that the run is alive, but not how many batches there are.
                phase("reading the examples")
                batch = micro_batch.batch
                task.model(batch.input_ids, batch.attention_mask, task.start_nd)
                states_BTd = outputs.pop()
                for row, text in enumerate(_texts(batch)):
                    self._by_text[text] = states_BTd[row].to("cpu", copy=True)
                if stop_requested(world):
                    raise stopped("the next start reads the examples again")

    @contextmanager
    def given(self, batch: Batch) -> Iterator[None]:
        """Start the model above the lower layers, with their outputs of a batch of the task."""
        # The lowest layers are skipped, and the last of them gives what it gave before.
        states = [self._by_text[text] for text in _texts(batch)]
        with without_layers(self._model, self._lower, num_outputs=self._num_outputs) as passages:
            passages[self._lower[-1]].given = torch.stack(states).to(self._model.model.device)
            yield


def _texts(batch: Batch) -> list[bytes]:
    """Return what tells the texts of a batch apart: their tokens."""
    tokens = batch.input_ids.cpu()
    lengths = batch.attention_mask.sum(dim=1).tolist()
    return [row[:length].numpy().tobytes() for row, length in zip(tokens, lengths, strict=True)]
