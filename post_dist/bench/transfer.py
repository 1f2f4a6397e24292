"""`post-dist bench transfer`: a transfer step beside the published loop.

All variants see the same batches of the run file's public text.

Shapes: B examples, n prompt tokens, d width, V vocabulary.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from post_dist.artifacts.task import PromptTask
from post_dist.bench.peers.transfer import (
    CachedLogits,
    cached_transfer_step,
    published_transfer_step,
)
from post_dist.bench.timing import Measure, time_steps
from post_dist.config.precision import Precision
from post_dist.config.schema import Engine, RunConfig
from post_dist.config.sources import Task
from post_dist.data.public_text import load_public_texts
from post_dist.data.template import Batch
from post_dist.errors import InputError
from post_dist.models.compiled import compile_layers
from post_dist.models.language_model import LanguageModel
from post_dist.models.load import load_tokenizer, load_whole
from post_dist.models.prompt_init import prompt_from_text
from post_dist.models.sharded import load_sharded
from post_dist.runtime.distributed import World
from post_dist.stages.transfer.builder import ObjectiveBuilder, PublicExamples, Tokenizers
from post_dist.stages.transfer.objective import ModelPair, TransferObjective
from post_dist.stages.transfer.step_losses import transfer_losses

MAX_EXAMPLES = 256
"""Maximum number of public examples from which the benchmark draws its batches."""

_NOISE = 0.1
"""Noise on the source prompt, as a fraction of the prompt's standard deviation. With it, the prompt
is not plain text."""

_PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")
_VARIANTS = ("published loop", "ours", "ours, compiled", "cached, plain torch")

Step = Callable[[], tuple[torch.Tensor, torch.Tensor]]
"""Takes a step; returns its loss and the gradient [n, d] of the prompt."""

LossOf = Callable[[list[int], torch.Tensor], torch.Tensor]
"""Maps the indices of B examples and a prompt [n, d] to a loss."""


def bench_transfer(
    config: RunConfig, teacher: Path, student: Path, world: World, measure: Measure = time_steps
) -> dict[str, Any]:
    """Measure time and memory of a whole step with Adam, for the published loss on the vocabulary.

    The published loop pads every text to `max_length`, as its code does.

    Args:
        config: the run file.
        teacher: folder of the target.
        student: folder of the student.
        world: the ranks.
        measure: measures the steps.

    Returns:
        The result of `measure` and three more entries. `max_difference` is the largest relative
        difference of loss or gradient from the published loop, among the variants in fp32. `once`
        describes the work before the first step. `settings` holds the shapes.

    Raises:
        InputError: the run file has no public task.
    """
    public_task = config.public_task
    if public_task is None:
        raise InputError("bench transfer needs the section `public_task`")
    bench = _TransferBench(config, public_task, teacher, student, world)

    # Every precision needs models of its own. All stay loaded, since the variants take turns.
    steps: dict[str, Step] = {}
    seconds_before: dict[str, float] = {}
    lengths: list[int] = []
    for precision in _PRECISIONS:
        setting = bench.prepare(precision)
        lengths = [len(example.token_ids) for example in setting.objective.examples]
        seconds_before[f"seconds_{precision}"] = setting.seconds
        for name, loss_of in setting.variants().items():
            steps[f"{name} {precision}"] = bench.step_of(setting, loss_of)

    # Rows of one variant follow each other. The first row of the table is the baseline.
    ordered = {}
    for variant in _VARIANTS:
        for precision in _PRECISIONS:
            name = f"{variant} {precision}"
            if name in steps:
                ordered[name] = steps[name]

    difference = _max_difference(ordered)
    batch_size = config.transfer.batch_size
    measured = measure(ordered, batch_size, "samples", world.device)
    return measured | {
        "max_difference": difference,
        "once": {"rows": len(lengths), **seconds_before},
        "settings": {
            "rows": batch_size,
            "num_virtual_tokens": config.tune.num_virtual_tokens,
            "max_length": public_task.max_length,
            "mean_tokens": sum(lengths) / len(lengths),
        },
    }


@dataclass(frozen=True)
class _Setting:
    """The models and data that the variants of one precision share.

    Attributes:
        objective: loss and examples.
        models: the student, and the target as the stage loads it.
        whole_target: the target without ZeRO.
        compiled_target: the target with compiled layers; None if `engine.compile` is not set.
        source_nd: the source prompt.
        seconds: time of the forward passes before the first step.
        device: device of the models.
    """

    objective: TransferObjective
    models: ModelPair
    whole_target: LanguageModel
    compiled_target: LanguageModel | None
    source_nd: torch.Tensor
    seconds: float
    device: torch.device

    def variants(self) -> dict[str, LossOf]:
        """Return the loss function of each variant, by name."""
        variants: dict[str, LossOf] = {
            "published loop": self._published_loss,
            "ours": partial(self._our_loss, self.models),
            "cached, plain torch": self._cached_loss(),
        }
        if self.compiled_target is not None:
            compiled = ModelPair(self.models.student, self.compiled_target)
            variants["ours, compiled"] = partial(self._our_loss, compiled)
        return variants

    def _published_loss(self, chosen: list[int], prompt_nd: torch.Tensor) -> torch.Tensor:
        batch = self._batch(chosen, self.objective.reader.template.max_length)
        return published_transfer_step(
            self.models.student,
            self.whole_target,
            batch,
            self.source_nd,
            prompt_nd,
            self.objective.section,
        )

    def _our_loss(
        self, models: ModelPair, chosen: list[int], prompt_nd: torch.Tensor
    ) -> torch.Tensor:
        (loss,) = transfer_losses(models, [self.objective], [prompt_nd], [chosen])
        return loss

    def _cached_loss(self) -> LossOf:
        """Compute the constant logits once, and return a loss function that uses them."""
        # Logits of all examples over the vocabulary, which the stage itself does not store: they
        # take too much memory for a real number of examples.
        outputs = self.objective.outputs
        with torch.no_grad():
            student, target = self.models.student, self.whole_target
            # The published loss always has it.
            source = student.head(cast(torch.Tensor, outputs.source).to(self.device))
            source_prompted = student.head(outputs.source_prompted.to(self.device))
            target_unprompted = target.head(outputs.target.to(self.device))

        def loss_of(chosen: list[int], prompt_nd: torch.Tensor) -> torch.Tensor:
            logits = CachedLogits(
                source[chosen], source_prompted[chosen], target_unprompted[chosen]
            )
            batch = self._batch(chosen)
            return cached_transfer_step(target, batch, logits, prompt_nd, self.objective.section)

        return loss_of

    def _batch(self, chosen: list[int], length: int = 0) -> Batch:
        examples = [self.objective.examples[index] for index in chosen]
        return self.objective.reader.collate(examples, length).to(self.device)


class _TransferBench:
    """Prepares and steps the variants of one run file."""

    def __init__(
        self, config: RunConfig, public_task: Task, teacher: Path, student: Path, world: World
    ) -> None:
        self._config = config
        self._teacher = teacher
        self._student = student
        self._world = world
        self._tokenizer = load_tokenizer(teacher)
        texts, _ = load_public_texts(public_task, "public_task")
        self._public = PublicExamples(texts[:MAX_EXAMPLES], [], public_task.template)
        # The benchmark compares logits over the vocabulary, so the task needs no label words.
        task = PromptTask.of_section(public_task, config.tune.init_text)
        self._task = replace(task, label_words=(), label_names=(), max_response_length=0)
        alpha = 0.5 if config.transfer.alpha == "auto" else config.transfer.alpha
        self._section = config.transfer.model_copy(
            update={
                "objective": "published",
                "scores": "vocabulary",
                "match_class_shares": False,
                "alpha": alpha,
            }
        )

    def prepare(self, precision: Precision) -> _Setting:
        """Load the models, and run the forward passes that come before training."""
        # The target is loaded as the stage loads it, and whole for the variants without ZeRO.
        device = self._world.device
        models = ModelPair(
            load_whole(self._student, precision, device),
            load_sharded(self._teacher, Engine(), precision, self._world),
        )
        source_nd = self._source_prompt(models)
        tokenizers = Tokenizers(self._tokenizer, self._tokenizer)
        builder = ObjectiveBuilder(models, tokenizers, self._public, self._world)
        start = time.perf_counter()
        objective = builder.build(self._task, source_nd, self._section)
        seconds = time.perf_counter() - start
        compiled_target = None
        if self._config.engine.compile:
            compiled_target = load_whole(self._teacher, precision, device)
            compile_layers(compiled_target)
        return _Setting(
            objective=objective,
            models=models,
            whole_target=load_whole(self._teacher, precision, device),
            compiled_target=compiled_target,
            source_nd=source_nd,
            seconds=seconds,
            device=device,
        )

    def step_of(self, setting: _Setting, loss_of: LossOf) -> Step:
        """Make a step that leaves the prompt where it is: Adam runs at a learning rate of 0.

        Args:
            setting: the precision's setting.
            loss_of: computes the loss of a variant.

        Returns:
            The step. Each call takes the next batch.
        """
        prompt_nd = setting.source_nd.clone().requires_grad_(True)
        optimizer = torch.optim.Adam([prompt_nd], lr=0.0)
        taken = 0

        def step() -> tuple[torch.Tensor, torch.Tensor]:
            nonlocal taken
            chosen = setting.objective.batch_at(taken, self._config.seed)
            taken += 1
            optimizer.zero_grad()
            loss = loss_of(chosen, prompt_nd)
            loss.backward()
            optimizer.step()
            # pyrefly: ignore[missing-attribute]
            return loss.detach(), prompt_nd.grad.detach().clone()

        return step

    def _source_prompt(self, models: ModelPair) -> torch.Tensor:
        """Make a source prompt [n, d]: the embeddings of the initial text with a little noise."""
        text_nd = prompt_from_text(
            models.target,
            self._tokenizer,
            self._task.init_text,
            self._config.tune.num_virtual_tokens,
        )
        generator = torch.Generator().manual_seed(self._config.seed)
        noise_nd = torch.randn(text_nd.shape, generator=generator).to(text_nd.device)
        return text_nd + _NOISE * text_nd.std() * noise_nd


def _max_difference(steps: Mapping[str, Step]) -> float:
    """Compare the first step of every variant in fp32 with that of the published loop.

    Returns:
        The largest relative difference of loss or gradient.
    """
    # Every variant takes its first step here, so that all of them continue with the same batch.
    first = {name: step() for name, step in steps.items()}
    baseline = first[f"{_VARIANTS[0]} fp32"]
    differences = []
    for name, results in first.items():
        if not name.endswith("fp32"):
            continue
        for own, published in zip(results, baseline, strict=True):
            differences.append(float((own - published).norm() / published.norm()))
    return max(differences)
