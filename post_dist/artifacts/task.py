"""`task.json`: the task of a soft prompt. The provider learns all of it.

Shapes: N examples, C classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from post_dist.config.sources import Task

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class PromptTask:
    """The task that a soft prompt was tuned for.

    Attributes:
        template: the template, with {text}, and with {mask} for a masked model.
        label_words: words of each class, in the order of the class scores; empty for a task that
            generates text.
        max_length: most tokens of one templated text.
        allow_multi_token: whether a word of several tokens is scored by its first token.
        init_text: the text that the prompt was initialized from.
        class_biases: the bias to add to the score of each class; empty if there are none.
        max_response_length: most tokens of one response; 0 for a task with classes.
        label_names: the value of each class in the owner's label column; empty in an older task,
            and for a task that generates text.
    """

    template: str
    label_words: tuple[tuple[str, ...], ...]
    max_length: int
    allow_multi_token: bool
    init_text: str
    class_biases: tuple[float, ...] = ()
    max_response_length: int = 0
    label_names: tuple[str, ...] = ()

    @property
    def class_names(self) -> tuple[str, ...]:
        """A name for each class: its label, or its first label word if the labels are unknown."""
        return self.label_names or tuple(words[0].strip() for words in self.label_words)

    def with_biases(self, scores_NC: "torch.Tensor") -> "torch.Tensor":
        """Add the class biases to class scores, if there are any."""
        if not self.class_biases:
            return scores_NC
        return scores_NC + scores_NC.new_tensor(self.class_biases)

    @classmethod
    def of_section(cls, section: Task, init_text: str | None) -> "PromptTask":
        """Make the task from a section of the run file.

        Args:
            section: the section, such as `private_task`. Without a template, the model reads the
                bare text.
            init_text: the text that the prompt is initialized from; None for a sentence with the
                task's label words.
        """
        # The labels are those of the run file. `init` copies them there from the private table, so
        # they count as released.
        return cls(
            template=section.template or "{text}",
            label_words=tuple(section.labels.values()),
            max_length=section.max_length,
            allow_multi_token=section.allow_multi_token,
            init_text=_start_of(section) if init_text is None else init_text,
            max_response_length=section.response_length,
            label_names=tuple(section.labels),
        )


def _start_of(section: Task) -> str:
    """Return a sentence with the first label word of each class."""
    return start_sentence([of_class[0].strip() for of_class in section.labels.values()])


def start_sentence(words: Sequence[str]) -> str:
    """Return a sentence that names the task, as a start for its prompt.

    Args:
        words: a word for each class; none for a task that generates text.
    """
    if not words:
        return "Write the response to this text"
    *others, last = words
    choice = f"{', '.join(others)} or {last}" if others else last
    return f"Predict if this text is {choice}"
