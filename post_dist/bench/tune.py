"""`post-dist bench tune`: a private training step beside the ordinary one.

The batch is random tokens. The benchmark reads no private example.

Shapes: B examples, n prompt tokens, d width.
"""

import secrets
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from post_dist.artifacts.task import PromptTask
from post_dist.bench.peers.tuning import OpacusHooks, plain_losses
from post_dist.bench.timing import Measure, time_steps
from post_dist.config.schema import RunConfig
from post_dist.conflicts import raise_conflicts
from post_dist.data.task_reader import TaskReader
from post_dist.data.template import Batch
from post_dist.errors import InputError
from post_dist.models.classifier import PromptInput, class_losses
from post_dist.models.compiled import compile_layers
from post_dist.models.language_model import LanguageModel
from post_dist.models.load import load_tokenizer, load_whole
from post_dist.models.prompt_init import prompt_from_text
from post_dist.privacy.gradients import ExampleGradients
from post_dist.privacy.mechanism import PrivateOptimizer
from post_dist.privacy.plan import PrivacyPlan
from post_dist.privacy.randomness import RandomSource
from post_dist.runtime.distributed import World
from post_dist.runtime.precision import choose_precision
from post_dist.stages.context_length import context_conflicts

_PLAN = PrivacyPlan(
    noise_multiplier=1.0,
    sampling_probability=0.01,
    steps=100,
    max_grad_norm=0.1,
    delta=1e-5,
    expected_batch_size=1.0,
)
"""A valid plan. The cost of a step does not depend on its values."""

_Step = Callable[[], torch.Tensor]
_GradientsAt = Callable[[torch.Tensor], torch.Tensor]
"""Compute the gradients of all examples [B, n, d] at a prompt [n, d]."""


def bench_tune(
    config: RunConfig, student: Path, world: World, measure: Measure = time_steps
) -> dict[str, Any]:
    """Measure time and memory of five kinds of tuning step, and of two with compiled layers.

    A step is a whole step with Adam on `tune.batch_size` examples of `private_task.max_length`
    tokens. Layers are compiled if `engine.compile` is set.

    Args:
        config: the run file.
        student: folder of the student.
        world: a single rank.
        measure: measures the steps.

    Returns:
        The result of `measure` and two more entries. `max_difference` is the largest relative
        difference between gradients that should be equal. It compares each example's gradient with
        that of the plain private step, and the non-private gradient with the sum over examples.
        `settings` holds the precision and the shapes.

    Raises:
        InputError: the run file has no private task with classes, or the student does not suit: it
            is a masked model, or its context is too short for prompt and text.
    """
    task = config.private_task
    if task is None or task.response_column is not None:
        raise InputError(
            "bench tune needs the section `private_task`, with label words and a length"
        )
    tokenizer = load_tokenizer(student)
    precision = choose_precision(config.engine, world.device)
    model = load_whole(student, precision, world.device)
    if model.masked:
        raise InputError(
            "bench tune compares ways to share a prefix, and a masked model has no prefix to share",
            "bench a causal student",
        )
    # The loss needs the task's label words, but not its data.
    prompt_task = PromptTask.of_section(task, config.tune.init_text)
    reader = TaskReader(prompt_task, tokenizer, masked=False, vocabulary=model.vocabulary_size)
    found = context_conflicts(
        "the model",
        model.context_length,
        config.tune.num_virtual_tokens,
        task.max_length,
        "lower tune.num_virtual_tokens or private_task.max_length",
    )
    raise_conflicts("bench tune", found)

    batch, classes_B = _random_batch(config.tune.batch_size, reader, config.seed)
    start_nd = prompt_from_text(
        model, tokenizer, prompt_task.init_text, config.tune.num_virtual_tokens
    )
    # The gradients are compared before the timing, on fresh prompts that are all equal.
    variants = _StepVariants(
        model, reader, batch.to(world.device), classes_B.to(world.device), start_nd
    )
    steps = variants.steps()
    if config.engine.compile:
        compiled = load_whole(student, precision, world.device)
        compile_layers(compiled)
        steps |= variants.compiled_steps(compiled)
    max_difference = _max_difference(steps)
    settings = {
        "precision": str(model.model.dtype).removeprefix("torch."),
        "rows": config.tune.batch_size,
        "tokens": task.max_length,
        "num_virtual_tokens": config.tune.num_virtual_tokens,
    }
    timings = measure(steps, config.tune.batch_size, "samples", world.device)
    return timings | {"max_difference": max_difference, "settings": settings}


def _random_batch(batch_size: int, reader: TaskReader, seed: int) -> tuple[Batch, torch.Tensor]:
    """Draw random tokens, each example of the task's full length, and their classes [B]."""
    # Every text fills the maximum length, so no step pads.
    length = reader.task.max_length
    generator = torch.Generator().manual_seed(seed)
    input_ids_BT = torch.randint(len(reader.tokenizer), (batch_size, length), generator=generator)
    classes_B = torch.randint(reader.num_classes, (batch_size,), generator=generator)
    answers_B = torch.full((batch_size,), length - 1)
    return Batch(input_ids_BT, torch.ones_like(input_ids_BT), answers_B), classes_B


class _StepVariants:
    """Private and ordinary steps on one batch.

    Each step trains its own prompt with Adam at a learning rate of 0, so that repeats are equal.

    Args:
        model: the frozen student.
        reader: the task, bound to the student's tokenizer.
        batch: examples on the model's device.
        classes_B: classes of the examples.
        start_nd: value of the prompt in every step.
    """

    def __init__(
        self,
        model: LanguageModel,
        reader: TaskReader,
        batch: Batch,
        classes_B: torch.Tensor,
        start_nd: torch.Tensor,
    ) -> None:
        self._model = model
        self._verbalizer = reader.verbalizer
        self._batch = batch
        self._classes_B = classes_B
        self._start_nd = start_nd

    def steps(self) -> dict[str, _Step]:
        """Return the steps by name. The first is the baseline of the ratios."""
        # The hooks are registered once. They have their own copy of the prompt.
        hooks = OpacusHooks(self._model, self._verbalizer, self._start_nd)
        model = self._model
        return {
            "ordinary non-private": self._ordinary(partial(self._plain_losses, model)),
            "opacus hooks": self._private(lambda prompt_nd: hooks(self._batch, self._classes_B)),
            "dp": self._private(self._exact_gradients(model, share_prefix=False)),
            "dp shared prefix": self._private(self._exact_gradients(model, share_prefix=True)),
            "non-private shared prefix": self._ordinary(self._losses_with_shared_prefix),
        }

    def compiled_steps(self, model: LanguageModel) -> dict[str, _Step]:
        """Return the two steps that compiled layers take, by name.

        Args:
            model: the student with compiled layers.
        """
        return {
            "ordinary, compiled": self._ordinary(partial(self._plain_losses, model)),
            "dp, compiled": self._private(self._exact_gradients(model, share_prefix=False)),
        }

    def _ordinary(self, losses_at: Callable[[torch.Tensor], torch.Tensor]) -> _Step:
        """Return a non-private step. It returns the gradient [n, d], summed over the examples."""
        prompt_nd = self._start_nd.clone().requires_grad_(True)
        optimizer = torch.optim.Adam([prompt_nd], lr=0.0)
        batch_size = len(self._classes_B)

        def step() -> torch.Tensor:
            # Training takes the mean. The caller compares sums, so multiply by the batch size.
            optimizer.zero_grad()
            losses_at(prompt_nd).mean().backward()
            optimizer.step()
            # pyrefly: ignore[missing-attribute]
            return batch_size * prompt_nd.grad.detach()

        return step

    def _private(self, gradients_at: _GradientsAt) -> _Step:
        """Return a private step. It returns each example's gradient [B, n, d], not clipped."""
        prompt_nd = self._start_nd.clone().requires_grad_(True)
        optimizer = PrivateOptimizer(
            torch.optim.Adam([prompt_nd], lr=0.0),
            _PLAN,
            RandomSource("bench", secrets.token_bytes(32)),
        )

        def step() -> torch.Tensor:
            # Clipping, noise and Adam's update are part of a private step.
            gradients_Bnd = gradients_at(prompt_nd)
            optimizer.accumulate([gradients_Bnd])
            # The batch is not private, so no ledger takes the commitment.
            optimizer.finish(0, lambda commitment: None)
            return gradients_Bnd

        return step

    def _plain_losses(self, model: LanguageModel, prompt_nd: torch.Tensor) -> torch.Tensor:
        return plain_losses(model, self._verbalizer, self._batch, self._classes_B, prompt_nd)

    def _losses_with_shared_prefix(self, prompt_nd: torch.Tensor) -> torch.Tensor:
        prompt = PromptInput(prefix=self._model.prefix_of(prompt_nd))
        return class_losses(self._model, self._verbalizer, self._batch, self._classes_B, prompt)

    def _exact_gradients(self, model: LanguageModel, *, share_prefix: bool) -> _GradientsAt:
        def gradients_at(prompt_nd: torch.Tensor) -> torch.Tensor:
            gradients = ExampleGradients(
                model, self._verbalizer, [prompt_nd], share_prefix=share_prefix
            )
            return gradients(self._batch, self._classes_B)[0]

        return gradients_at


def _max_difference(steps: dict[str, _Step]) -> float:
    """Return the largest relative difference between gradients that should be equal."""
    expected_Bnd = steps["dp"]()
    # Ways to compute each example's gradient must agree example by example.
    differences = []
    of_examples = {"opacus hooks", "dp shared prefix", "dp, compiled"}
    for name in of_examples & steps.keys():
        differences.append(_relative_difference(steps[name](), expected_Bnd))
    # A non-private step gives only the sum, which is compared as a batch of one.
    expected_sum_Bnd = expected_Bnd.sum(dim=0)[None]
    of_sums = {"ordinary non-private", "non-private shared prefix", "ordinary, compiled"}
    for name in of_sums & steps.keys():
        differences.append(_relative_difference(steps[name]()[None], expected_sum_Bnd))
    return max(differences)


def _relative_difference(found_Bnd: torch.Tensor, expected_Bnd: torch.Tensor) -> float:
    """Return the largest relative difference of an example's gradient."""
    difference_B = (found_Bnd - expected_Bnd).flatten(1).norm(dim=1)
    return float((difference_B / expected_Bnd.flatten(1).norm(dim=1)).max())
