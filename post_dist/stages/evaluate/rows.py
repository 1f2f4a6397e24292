"""The rows of the comparison table: the name of each, the prompt that it needs, and its scores.

To add a baseline, write a subclass of `Row` and put it into `ROWS`. For an optional baseline, also
add its name to `Evaluate.baselines` in the schema and test for that name in `is_wanted`. The
pipeline asks each row which prompt to train for it. The evaluation asks each row for its scores.

Shapes: N examples, C classes, R tokens of a response.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch

from post_dist.artifacts.evaluation_table import DP_REGRESSION
from post_dist.artifacts.prompt import SoftPromptArtifact
from post_dist.config.schema import RunConfig
from post_dist.losses.transfer import proxy_logits
from post_dist.stages.evaluate.cached_answers import CachedAnswers
from post_dist.stages.transfer.published import with_published_transfer


@dataclass(frozen=True)
class PromptVariant:
    """One prompt on the student that a table compares.

    A table with several epsilons has one variant for each.

    Attributes:
        label: suffix of the names of its rows, such as `, epsilon 4`; empty for the run file's own
            prompt.
        config: the run file, with the privacy plan of this prompt.
        source: folder of the prompt on the student.
        given_target: folder of a transferred prompt that the run file names; None if it must be
            trained.
    """

    label: str
    config: RunConfig
    source: Path
    given_target: Path | None = None


@dataclass(frozen=True)
class TargetPrompt:
    """The way in which a row gets its prompt on the target.

    Attributes:
        made_by: `transfer` trains it from the source prompt, and `tune` from the private data.
            `given` reads a folder.
        config: the run file to train with.
        folder: the folder of a given prompt; otherwise None.
    """

    made_by: Literal["transfer", "tune", "given"]
    config: RunConfig
    folder: Path | None = None


@dataclass(frozen=True)
class RowInputs:
    """The inputs of all rows of one prompt variant.

    Attributes:
        config: the run file.
        label: suffix of the names of the rows.
        student: answers of the student.
        target: answers of the target; None for a data owner, who has none.
        source: the prompt on the student.
        on_target: prompts that were made for the target, by the name of their row.
        text_baselines: class scores [N, C] of classifiers without a language model, by their name.
        private_text_scores: class scores [N, C] of such a classifier at the epsilon of the source
            prompt, or None.
    """

    config: RunConfig
    label: str
    student: CachedAnswers
    target: CachedAnswers | None
    source: SoftPromptArtifact
    on_target: Mapping[str, SoftPromptArtifact]
    text_baselines: Mapping[str, torch.Tensor]
    private_text_scores: torch.Tensor | None


@dataclass(frozen=True)
class TableEntry:
    """One line of the table.

    Attributes:
        name: name of the line, which ends with the label of its prompt variant.
        answers: class scores [N, C], or tokens [N, R] of responses.
        measured_by: the model that gave the answers; it computes their metrics.
        epsilon: epsilon of the prompt; None if no private data was used or no privacy is claimed.
    """

    name: str
    answers: torch.Tensor
    measured_by: CachedAnswers
    epsilon: float | None = None


class Row(ABC):
    """One kind of row.

    Attributes:
        name: name of the row in the table.
        once: whether the table has the row once, instead of once for each prompt variant.
    """

    name: ClassVar[str]
    once: ClassVar[bool] = False

    def is_wanted(self, config: RunConfig) -> bool:
        """Return whether the run file asks for this row."""
        return True

    def target_prompt(self, variant: PromptVariant) -> TargetPrompt | None:
        """Return how the pipeline gets this row's prompt on the target, or None without one."""
        return None

    @abstractmethod
    def entries(self, inputs: RowInputs) -> list[TableEntry]:
        """Compute the lines of this row. The list is empty if the row does not apply."""


class WithoutPrompt(Row):
    """The model without any prompt: the target, or the student where there is no target."""

    name = "zero-shot"
    once = True

    def entries(self, inputs: RowInputs) -> list[TableEntry]:
        """Compute the answers without a prompt."""
        if inputs.target is None:
            return [TableEntry("student", inputs.student.answers(None, "student"), inputs.student)]
        # Progress bars name a forward pass by its row in the table.
        answers = inputs.target.answers(None, self.name)
        return [TableEntry(self.name, answers, inputs.target)]


class TextBaselines(Row):
    """Classifiers without a language model, fitted to the training split without privacy."""

    name = "text baselines"
    once = True

    def entries(self, inputs: RowInputs) -> list[TableEntry]:
        """Return a line for each classifier; none for a task that generates text."""
        return [
            TableEntry(name, scores_NC, inputs.student)
            for name, scores_NC in inputs.text_baselines.items()
        ]


class PrivateTextBaseline(Row):
    """A classifier without a language model, at the epsilon of the prompt on the student."""

    name = DP_REGRESSION

    def entries(self, inputs: RowInputs) -> list[TableEntry]:
        """Return a line if the prompt was tuned with privacy for examples."""
        scores_NC = inputs.private_text_scores
        if scores_NC is None:
            return []
        name = self.name + inputs.label
        return [TableEntry(name, scores_NC, inputs.student, inputs.source.epsilon)]


class StudentPrompt(Row):
    """The prompt on the student that it was tuned on."""

    name = "student + prompt"

    def entries(self, inputs: RowInputs) -> list[TableEntry]:
        """Compute the answers with the class biases of the prompt's task, and without them."""
        return _prompt_entries(self.name, inputs, inputs.student, inputs.source)


class DirectTransfer(Row):
    """The student's prompt on the target, unchanged."""

    name = "direct transfer"

    def entries(self, inputs: RowInputs) -> list[TableEntry]:
        """Compute the answers, if the prompt fits the target's width and tokenizer.

        An adapter fits the student alone, and the prompt is nothing without it.
        """
        if inputs.target is None or inputs.source.adapter is not None:
            return []
        if not inputs.target.accepts(inputs.source):
            return []
        # Keep only the first line. The owner's prompt includes its biases, so the line without them
        # would be a different prompt.
        return _prompt_entries(self.name, inputs, inputs.target, inputs.source)[:1]


class TargetPromptRow(Row):
    """A row with a prompt of its own on the target."""

    def entries(self, inputs: RowInputs) -> list[TableEntry]:
        """Compute the answers with the class biases of the prompt's task, and without them."""
        if inputs.target is None or self.name not in inputs.on_target:
            return []
        return _prompt_entries(self.name, inputs, inputs.target, inputs.on_target[self.name])


class PublishedTransfer(TargetPromptRow):
    """The prompt after a transfer with the loss of the paper."""

    name = "published transfer"

    def is_wanted(self, config: RunConfig) -> bool:
        """Return whether the run file names this baseline."""
        return self.name in config.evaluate.baselines

    def target_prompt(self, variant: PromptVariant) -> TargetPrompt:
        """Ask for a transfer with the paper's loss."""
        # For a fair comparison, steps, batch size and learning rate are those of the run file.
        return TargetPrompt("transfer", with_published_transfer(variant.config))


class TransferredPrompt(TargetPromptRow):
    """The prompt after the transfer with the run file's settings."""

    name = "transferred"

    def target_prompt(self, variant: PromptVariant) -> TargetPrompt:
        """Ask for a transfer, or for the prompt that the run file names."""
        if variant.given_target is not None:
            return TargetPrompt("given", variant.config, variant.given_target)
        return TargetPrompt("transfer", variant.config)


class ProxyTuning(Row):
    """The target's scores plus the change in scores that the prompt makes on the student.

    It needs no training, but both models run at inference (Liu et al. 2024). If the transfer aims
    at the ensemble of both models, so does this row, and has its name.
    """

    name = "proxy-tuning"

    def entries(self, inputs: RowInputs) -> list[TableEntry]:
        """Combine the class scores of both models; a task that generates text has none."""
        if inputs.target is None or inputs.student.generates:
            return []
        # The first entry has the class biases, which are part of the change that the prompt makes.
        # The answers are cached, so they are not computed again.
        (prompted, *_) = StudentPrompt().entries(inputs)
        subtracts = inputs.config.transfer.subtracts_student
        scores_NC = proxy_logits(
            inputs.student.answers(None, "student") if subtracts else None,
            prompted.answers,
            inputs.target.answers(None, WithoutPrompt.name),
            inputs.config.transfer.proxy_lambda,
        )
        name = (self.name if subtracts else "ensemble") + inputs.label
        return [TableEntry(name, scores_NC, inputs.student, inputs.source.epsilon)]


class FullPromptTuning(TargetPromptRow):
    """A prompt that was tuned on the target with the private data.

    The threat model forbids it, because the target would see the data. It serves as a reference
    for what a transfer can reach.
    """

    name = "full prompt tuning"

    def is_wanted(self, config: RunConfig) -> bool:
        """Return whether the run file names this baseline."""
        return self.name in config.evaluate.baselines

    def target_prompt(self, variant: PromptVariant) -> TargetPrompt:
        """Ask for prompt tuning on the target."""
        return TargetPrompt("tune", variant.config)


ROWS: tuple[Row, ...] = (
    WithoutPrompt(),
    TextBaselines(),
    PrivateTextBaseline(),
    StudentPrompt(),
    DirectTransfer(),
    PublishedTransfer(),
    TransferredPrompt(),
    ProxyTuning(),
    FullPromptTuning(),
)
"""All rows, in the order of the table."""


def target_prompts(variant: PromptVariant) -> dict[str, TargetPrompt]:
    """Collect the prompts on the target that one variant needs, by the name of their row."""
    # Rows that the run file does not ask for are not trained.
    needed = {}
    for row in ROWS:
        if not row.is_wanted(variant.config):
            continue
        prompt = row.target_prompt(variant)
        if prompt is not None:
            needed[row.name] = prompt
    return needed


def table_entries(inputs: RowInputs, *, first: bool) -> list[TableEntry]:
    """Compute all lines of one prompt variant.

    Args:
        inputs: the inputs of the rows.
        first: whether this is the first variant of the table. Rows with `once` belong to it.

    Returns:
        The lines, in the order of the table.
    """
    entries = []
    for row in ROWS:
        if row.is_wanted(inputs.config) and (first or not row.once):
            entries += row.entries(inputs)
    return entries


def _prompt_entries(
    name: str, inputs: RowInputs, model: CachedAnswers, prompt: SoftPromptArtifact
) -> list[TableEntry]:
    """Compute the answers of a model with a prompt.

    Args:
        name: name of the row.
        inputs: inputs of the row.
        model: the model that answers.
        prompt: the prompt in front of each example.

    Returns:
        One line; or two lines, with and without class biases, if the prompt's task has them.
    """
    # Cached answers are without biases, because they depend only on the prompt's vectors.
    name += inputs.label
    answers = model.answers(prompt, name)
    if not prompt.task.class_biases:
        return [TableEntry(name, answers, model, prompt.epsilon)]
    return [
        TableEntry(name, prompt.task.with_biases(answers), model, prompt.epsilon),
        TableEntry(f"{name}, without biases", answers, model, prompt.epsilon),
    ]
