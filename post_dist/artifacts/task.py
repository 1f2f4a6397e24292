"""`task.json`: the task of a soft prompt. It is all that the provider learns of the private task."""

from dataclasses import dataclass

from post_dist.config.sources import Task


@dataclass(frozen=True)
class PromptTask:
    """The task that a soft prompt was tuned for.

    Attributes:
        template: what the model reads, with {text} and perhaps {mask}.
        label_words: for each class its words, in the order of the class scores; none for a task that generates text.
        max_length: most tokens of one templated text.
        allow_multi_token: whether a word of several tokens is represented by its first.
        init_text: the words that the prompt started from.
        class_biases: what is added to the class scores, or nothing.
        max_response_length: most tokens of one response, for a task that generates text; else 0.
    """

    template: str
    label_words: tuple[tuple[str, ...], ...]
    max_length: int
    allow_multi_token: bool
    init_text: str
    class_biases: tuple[float, ...] = ()
    max_response_length: int = 0

    @classmethod
    def of_section(cls, section: Task, init_text: str) -> "PromptTask":
        """The task that a run file describes.

        Args:
            section: `private_task`, with a template; or a public one, whose missing template reads the bare text.
            init_text: the words that the prompt starts from.
        """
        return cls(
            template=section.template or "{text}",
            label_words=tuple(section.labels.values()),
            max_length=section.max_length,
            allow_multi_token=section.allow_multi_token,
            init_text=init_text,
            max_response_length=section.response_length,
        )
