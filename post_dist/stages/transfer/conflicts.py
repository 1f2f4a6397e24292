"""The conflicts of a transfer: settings that do not suit the prompt, the models or the ranks."""

from dataclasses import dataclass

from post_dist.artifacts.head import LinearHead
from post_dist.artifacts.prompt import PromptContents
from post_dist.artifacts.task import PromptTask
from post_dist.config.schema import RunConfig, Transfer
from post_dist.config.sources import Task
from post_dist.conflicts import Conflict, Layout
from post_dist.models.facts import ModelFacts
from post_dist.models.generation import generation_conflicts
from post_dist.models.lora_layers import lora_conflicts
from post_dist.runtime.engine_conflicts import compile_conflicts, engine_conflicts
from post_dist.stages.context_length import context_conflicts

LEAST_TEXTS = 8
"""Number of public texts that a head needs. Of fewer, too few are held out to choose anything."""

# The source prompt may be finished, and its task then comes from its file.
_SHORTER_PROMPT = "tune the prompt with a lower tune.num_virtual_tokens or private_task.max_length"


@dataclass(frozen=True)
class TransferModels:
    """The two models of a transfer.

    Attributes:
        student: facts of the model that the prompt was tuned on.
        target: facts of the large model that it is transferred to.
        same_tokenizer: whether both have the same tokenizer.
    """

    student: ModelFacts
    target: ModelFacts
    same_tokenizer: bool


@dataclass(frozen=True)
class SourcePrompt:
    """A prompt that a run transfers.

    Attributes:
        num_virtual_tokens: number n of vectors of the prompt.
        task: the task that it was, or will be, tuned for.
        has_head: whether a head was tuned behind it.
    """

    num_virtual_tokens: int
    task: PromptTask
    has_head: bool = False

    @classmethod
    def of(cls, prompt: PromptContents) -> "SourcePrompt":
        """Describe a prompt that is there."""
        has_head = isinstance(prompt.adapter, LinearHead)
        return cls(len(prompt.embeddings), prompt.task, has_head)


def conflicts(
    config: RunConfig, models: TransferModels, prompt: SourcePrompt, layout: Layout
) -> list[Conflict]:
    """Find what keeps the transfer of one prompt from running.

    Args:
        config: the run file; its section `public_task` must be there.
        models: student and target.
        prompt: the prompt.
        layout: the ranks of the stage.

    Returns:
        All conflicts.
    """
    public_task = config.public_task
    if public_task is None:
        return [Conflict("the run file lacks the section public_task", "add it")]
    found = engine_conflicts(config.engine, layout)
    if config.transfer.adapter != "head":
        found += compile_conflicts(config.engine, layout)
    found += _model_conflicts(config.transfer, models)
    limit = public_task.max_rows
    if config.transfer.adapter == "head" and limit is not None and limit < LEAST_TEXTS:
        found.append(few_texts(limit))
    if config.transfer.lora is not None:
        target = models.target
        found += lora_conflicts("transfer", config.transfer.lora, target.linears, target.family)
    # In both models the public text follows a prompt of the same length.
    longest = prompt.task.max_length + prompt.task.max_response_length
    for whose, facts in (("the student", models.student), ("the target", models.target)):
        found += context_conflicts(
            whose, facts.context_length, prompt.num_virtual_tokens, longest, _SHORTER_PROMPT
        )
        found += generation_conflicts(whose, facts, prompt.task.max_response_length)
    if prompt.task.max_response_length:
        found += _generation_conflicts(config.transfer, public_task)
    if prompt.has_head and config.transfer.scores != "classes":
        found.append(
            Conflict(
                "the source prompt has a head, which scores the classes and no other word",
                "set transfer.scores: classes",
            )
        )
    return found


def few_texts(count: int) -> Conflict:
    """Return the conflict of a head with too few public texts."""
    return Conflict(
        f"transfer.adapter: head needs {LEAST_TEXTS} public texts, and public_task has {count}",
        "give more texts, or choose adapter: prompt",
    )


def _model_conflicts(section: Transfer, models: TransferModels) -> list[Conflict]:
    """Check that the outputs which the settings compare are comparable between the two models."""
    student = models.student
    target = models.target
    found = []
    if student.masked != target.masked:
        found.append(
            Conflict(
                "student and target are not both causal or both masked models",
                "choose a student of the target's kind",
            )
        )
    # A prompt that starts from text alone does not use the student's embeddings.
    if student.width != target.width and section.trained_share:
        found.append(
            Conflict(
                f"transfer.trained_share is {section.trained_share:g}, but vectors of width "
                f"{student.width} do not fit a target of width {target.width}",
                "set transfer.trained_share: 0, so that the prompt starts from text",
            )
        )
    # Class scores can be compared across tokenizers, because each model tokenizes the label words.
    if section.scores == "vocabulary" and not models.same_tokenizer:
        found.append(
            Conflict(
                "transfer.scores: vocabulary compares logits token by token, and student and "
                "target have different tokenizers",
                "set transfer.scores: classes; the label words then connect them",
            )
        )
    return found


def _generation_conflicts(section: Transfer, public_task: Task) -> list[Conflict]:
    """Check the settings for a prompt that generates text."""
    found = []
    if public_task.response_column is None:
        found.append(
            Conflict(
                "the prompt generates text, and the public task has no responses to learn from",
                "set public_task.response_column; the loss is taken at each of its tokens",
            )
        )
    # Without classes there are no class scores, and no agreement of predicted classes.
    wrong = []
    if section.scores == "classes":
        wrong.append("scores: classes")
    if section.alpha == "auto":
        wrong.append("alpha: auto")
    for setting in wrong:
        found.append(
            Conflict(
                f"transfer.{setting} is for tasks with classes, and the prompt generates text",
                "set transfer.scores: vocabulary and a number for transfer.alpha",
            )
        )
    return found
