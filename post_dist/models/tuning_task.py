"""The model, task and examples that a prompt is tuned with, privately or not.

Shapes: B examples of a batch, N examples, n prompt tokens, d width, C classes, R tokens of a
response, m features of a head, k values of the hidden states of several layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import torch

from post_dist.artifacts.head import LinearHead
from post_dist.artifacts.lora import Lora
from post_dist.artifacts.prefix import Prefix
from post_dist.artifacts.prompt import Adapter
from post_dist.data.task_reader import TaskReader
from post_dist.data.template import Batch, Encoded
from post_dist.data.verbalizer import Verbalizer
from post_dist.models.classifier import PromptInput, class_losses, word_scores
from post_dist.models.generation import response_losses
from post_dist.models.language_model import LanguageModel

NeededAdapter = TypeVar("NeededAdapter", bound=LinearHead | Lora | Prefix)


@dataclass(frozen=True)
class TuningTask:
    """A frozen model, a task, and the encoded examples that a prompt is tuned on.

    Attributes:
        model: a frozen model in evaluation mode.
        reader: the task bound to the model's tokenizer.
        examples: the encoded texts, with their responses where the task generates text.
        targets: the classes [N], or the tokens of the responses [N, R].
        start_nd: the initial prompt.
        users: the number of each example's user; empty if every example is a unit of its own.
        adapter: the adapter to start from, behind the prompt or in its place; None if the prompt
            itself is tuned.
    """

    model: LanguageModel
    reader: TaskReader
    examples: list[Encoded]
    targets: torch.Tensor
    start_nd: torch.Tensor
    users: Sequence[int] = ()
    adapter: Adapter | None = None

    @cached_property
    def units(self) -> list[list[int]]:
        """The examples of each unit of privacy: one example, or all examples of a user."""
        if not self.users:
            return [[example] for example in range(len(self.examples))]
        units: list[list[int]] = [[] for _ in range(max(self.users) + 1)]
        for example, user in enumerate(self.users):
            units[user].append(example)
        return units

    def need(self, kind: type[NeededAdapter]) -> NeededAdapter:
        """Return the adapter, which must be of a kind.

        Raises:
            TypeError: the task tunes something else, which is a bug of the caller.
        """
        if not isinstance(self.adapter, kind):
            raise TypeError(f"the task has no {kind.title}")
        return self.adapter

    @property
    def shares_prompt(self) -> bool:
        """Whether a batch may run the prompt once for all its examples.

        That needs one answer position for each example, but responses have many.
        """
        return not self.reader.generates and self.model.shares_prompt


class AnswerStates:
    """Runs the model behind the initial prompt of a task, without gradients.

    Args:
        task: the model, the prompt, the label words, and the head that reads the states.
    """

    @torch.no_grad()
    def __init__(self, task: TuningTask) -> None:
        self._model = task.model
        # In most causal models the prompt's keys and values are the same for all examples.
        keeps = task.model.keeps_prefix
        self._prompt = None if keeps else task.start_nd
        self._prefix = task.model.prefix_of(task.start_nd) if keeps else None
        self._word_scores = word_scores(task.model, task.reader.verbalizer)
        self._head = task.need(LinearHead)
        self._layers = self._head.layers(task.model.width, len(task.model.layers))

    @torch.no_grad()
    def __call__(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Run a batch on the model's device.

        Returns:
            The hidden states [B, m] at the answers, which the head reads, and the class scores
            [B, C] of the label words.
        """
        hidden_Bk = self._model(
            batch.input_ids,
            batch.attention_mask,
            self._prompt,
            batch.answer,
            self._prefix,
            layers=self._layers,
        )
        of_words_BC = self._word_scores(hidden_Bk[:, -self._model.width :])
        return self._head.read(hidden_Bk), of_words_BC


def example_losses(
    model: LanguageModel,
    verbalizer: Verbalizer,
    batch: Batch,
    targets: torch.Tensor,
    prompt: PromptInput,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute the loss [B] of each example, over its class or the tokens of its response.

    Args:
        model: a frozen model.
        verbalizer: maps logits to class scores; not used for responses.
        batch: examples on the model's device.
        targets: classes [B], or tokens of the responses [B, R].
        prompt: the soft prompt before each example; responses do not use `PromptInput.shared`.
        bias: bias parameters [C] or [B, C]; not used for responses.
    """
    # Responses have one more dimension than classes.
    if targets.dim() == 2:
        return response_losses(model, batch, targets, prompt=prompt.prompt, prefix=prompt.prefix)
    return class_losses(model, verbalizer, batch, targets, prompt, bias)
