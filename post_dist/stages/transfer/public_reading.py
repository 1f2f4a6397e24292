"""A model that reads the public text of a transfer.

Shapes: B examples of a batch, N public examples, C classes, R tokens of a response, n prompt
tokens, d width, k values of the hidden states of several layers.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch

from post_dist.artifacts.head import LinearHead
from post_dist.artifacts.lora import Lora
from post_dist.artifacts.prefix import Prefix
from post_dist.config.schema import Transfer
from post_dist.data.task_reader import TaskReader
from post_dist.data.template import Encoded
from post_dist.models.adapted import adapted
from post_dist.models.batch_inference import InferenceRun, map_batches, outputs_at_answers
from post_dist.models.classifier import word_scores
from post_dist.models.generation import response_hidden
from post_dist.models.headed import scores_of_states
from post_dist.models.language_model import LanguageModel
from post_dist.runtime.distributed import World

INFERENCE_FACTOR = 4
"""Examples in one forward here, for each example of a rank's training batch.

A forward without gradients holds the activations of one layer. A training step holds those of all
layers.
"""


@dataclass(frozen=True)
class PublicReading:
    """One model that reads the public examples of one task.

    Attributes:
        name: `student` or `target`.
        model: the model.
        reader: the task, bound to the model's tokenizer.
        examples: the public texts, encoded by `reader`.
        section: settings of the loss.
        world: the ranks, which all compute.
    """

    name: str
    model: LanguageModel
    reader: TaskReader
    examples: list[Encoded]
    section: Transfer
    world: World

    def outputs(
        self, prompt_nd: torch.Tensor | None, label: str, adapter: Lora | Prefix | None = None
    ) -> torch.Tensor:
        """Compute the outputs to store for all public examples.

        Args:
            prompt_nd: soft prompt [n, d], or None.
            label: name of the forward pass in progress bars.
            adapter: a LoRA behind the prompt, or a prefix in its place.

        Returns:
            One of three kinds. Class scores [N, C], which include the task's class biases if there
            is a prompt. Hidden states [N, d]. For a task that generates text, hidden states
            [N, R, d].
        """
        with adapted(self.model, adapter):
            return self._model_outputs(prompt_nd, self._run(label))

    def states(
        self,
        prompt_nd: torch.Tensor,
        layers: Sequence[int],
        rows: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """Compute hidden states at the answers of public examples behind a prompt.

        All ranks call it.

        Args:
            prompt_nd: soft prompt [n, d].
            layers: the layers, counted from 0.
            rows: the examples to read; None for all of them.

        Returns:
            The states [N, len(layers) d] in the order of the layers.
        """
        examples = self.examples if rows is None else [self.examples[row] for row in rows]
        return outputs_at_answers(
            self.model,
            examples,
            self.reader.template,
            prompt_nd,
            lambda states_Bk: states_Bk,
            self._run(f"{self.name} + prompt"),
            layers=layers,
        )

    @torch.no_grad()
    def headed_scores(
        self, states_Nk: torch.Tensor, head: LinearHead | None = None
    ) -> torch.Tensor:
        """Compute class scores [N, C] from hidden states, on the CPU. All ranks call it.

        Args:
            states_Nk: states of some layers, of which the last is the model's last one.
            head: a head that reads the first ones; None for the scores of the label words.
        """
        of_words = word_scores(self.model, self.reader.verbalizer)
        # Batches limit the device memory that this takes.
        parts = []
        for states_Bk in states_Nk.split(self._run("").batch_size):
            on_device = states_Bk.to(self.world.device)
            parts.append(scores_of_states(on_device, of_words, self.model.width, head).cpu())
        return torch.cat(parts)

    def _run(self, label: str) -> InferenceRun:
        # Without gradients, more examples fit into one forward than in a training step.
        trained_at_once = -(-self.section.batch_size // self.world.size)
        return InferenceRun(INFERENCE_FACTOR * trained_at_once, self.world, label)

    def _model_outputs(self, prompt_nd: torch.Tensor | None, run: InferenceRun) -> torch.Tensor:
        """Run the model on all public examples."""
        if self.reader.generates:
            return map_batches(
                self.examples, lambda chosen: self._response_hidden(chosen, prompt_nd), run
            )
        # Class scores are small, so they are stored with their biases. Logits over the vocabulary
        # are large, so the hidden states in front of the head are stored instead. The biases are
        # then added after the head has run.
        by_classes = self.section.scores == "classes"
        biases = () if prompt_nd is None else self.reader.task.class_biases

        def reduce(outputs: torch.Tensor) -> torch.Tensor:
            if not by_classes:
                return outputs
            return self.reader.scores(self.reader.verbalizer.lift(outputs, biases))

        return outputs_at_answers(
            self.model,
            self.examples,
            self.reader.template,
            prompt_nd,
            reduce,
            run,
            layers=None if by_classes else [len(self.model.layers) - 1],
        )

    def _response_hidden(
        self, chosen: list[Encoded], prompt_nd: torch.Tensor | None
    ) -> torch.Tensor:
        batch = self.reader.collate(chosen).to(self.world.device)
        length = self.reader.task.max_response_length
        return response_hidden(self.model, batch, length, prompt=prompt_nd)

    def class_scores(self, stored: torch.Tensor, *, prompted: bool = False) -> torch.Tensor:
        """Turn stored outputs into class scores.

        Args:
            stored: outputs of this model, as `outputs` returns them.
            prompted: whether they were computed with the prompt. Its class biases are then added.

        Returns:
            Class scores [N, C], on the CPU.
        """
        if self.section.scores == "classes":
            return stored
        # Hidden states are stored. Compute only the logits of the label words from them.
        scores_NC = self.headed_scores(stored)
        return self.reader.task.with_biases(scores_NC) if prompted else scores_NC


class PromptedStates:
    """Hidden states behind a prompt. For each model, those of the last prompt are kept.

    The heads of many owners stand behind one public prompt, so its states serve all of them.
    """

    def __init__(self) -> None:
        self._prompts: dict[str, bytes] = {}
        self._kept: dict[str, dict[Hashable, torch.Tensor]] = {}

    def of(
        self,
        reading: PublicReading,
        prompt_nd: torch.Tensor,
        layers: Sequence[int],
        rows: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """Return the states [N, k] that `PublicReading.states` computes. All ranks call it.

        Args:
            reading: the model and the public text.
            prompt_nd: soft prompt [n, d].
            layers: the layers, counted from 0.
            rows: the examples to read; None for all of them.
        """
        name = reading.name
        prompt = prompt_nd.cpu().numpy().tobytes()
        if prompt != self._prompts.get(name):
            self._prompts[name] = prompt
            self._kept[name] = {}
        key = (reading.reader.task, tuple(layers), None if rows is None else tuple(rows))
        if key not in self._kept[name]:
            self._kept[name][key] = reading.states(prompt_nd, layers, rows)
        return self._kept[name][key]

    def forget(self) -> None:
        """Free the memory of all states."""
        self._prompts.clear()
        self._kept.clear()
