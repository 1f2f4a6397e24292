"""A task bound to a tokenizer: it turns texts into tokens, and logits into class scores.

Shapes: B examples, C classes, N examples, R tokens of a response, V vocabulary.
"""

from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from post_dist.artifacts.task import PromptTask
from post_dist.data.template import NO_TOKEN, Batch, Encoded, Template
from post_dist.data.verbalizer import Verbalizer
from post_dist.errors import ArtifactRefused
from post_dist.runtime.limited_child import ChildFailed, in_limited_child

_MIB = 1 << 20
_LEAST_SECONDS = 60
_SECONDS_PER_MIB = 60
"""An honest tokenizer needs about 2 s for each MiB of long texts."""
_TEXTS_PER_SECOND = 500
_LEAST_MEMORY_BYTES = 512 * _MIB
_MEMORY_FACTOR = 256
"""Bytes of memory for each byte of text. A list of tokens needs about 40."""


class TaskReader:
    """Reads texts and scores answers of one task with one tokenizer.

    Args:
        task: template, label words and lengths.
        tokenizer: the model's tokenizer, which must be a fast one.
        masked: whether the model is a masked one.
        vocabulary: number of tokens that the model has an embedding for.

    Attributes:
        template: the template bound to the tokenizer.
        verbalizer: the label words bound to the tokenizer. It has no classes if the task generates
            text.

    Raises:
        InputError: the template does not suit the model, or a label word is several tokens or
            belongs to two classes.
    """

    def __init__(
        self,
        task: PromptTask,
        tokenizer: PreTrainedTokenizerBase,
        *,
        masked: bool,
        vocabulary: int,
    ) -> None:
        self.task = task
        self.tokenizer = tokenizer
        # Both constructors check the task against the tokenizer.
        self.template = Template(
            task.template,
            tokenizer,
            task.max_length,
            masked=masked,
            vocabulary=vocabulary,
            max_response_length=task.max_response_length,
        )
        self.verbalizer = Verbalizer(
            task.label_words, tokenizer, allow_multi_token=task.allow_multi_token
        )

    @property
    def generates(self) -> bool:
        """Whether the task generates text; otherwise it has classes."""
        return self.task.max_response_length > 0

    @property
    def num_classes(self) -> int:
        """Number of classes C; 0 for a task that generates text."""
        return len(self.verbalizer.token_ids)

    @property
    def longest(self) -> int:
        """Most tokens of an example with its response."""
        return self.template.longest

    def encode(self, texts: list[str], responses: Sequence[str] = ()) -> list[Encoded]:
        """Tokenize texts in the template.

        Args:
            texts: the texts.
            responses: a response to append to each text. A task with classes ignores them.

        Raises:
            ArtifactRefused: the tokenizer crashes on a text, or needs far more time or memory than
                any honest one.
        """
        used = responses if self.generates else ()

        def encode() -> list[tuple[list[int], int, tuple[int, ...]]]:
            rows = self.template.encode(texts, used)
            return [(row.token_ids, row.answer, row.response) for row in rows]

        # The student's owner has made the tokenizer. The door tries it on a few texts alone, and
        # it may behave differently on these. A library's message could quote them.
        size = sum(len(text.encode()) for text in [*texts, *used])
        seconds = _LEAST_SECONDS + _SECONDS_PER_MIB * size // _MIB + len(texts) // _TEXTS_PER_SECOND
        try:
            rows = in_limited_child(encode, seconds, _LEAST_MEMORY_BYTES + _MEMORY_FACTOR * size)
        except ChildFailed:
            raise ArtifactRefused(
                "the model's tokenizer cannot read the texts: it crashes, or needs too much time "
                "or memory",
                "use another model, and ask who made this one",
            ) from None
        return [Encoded(ids, answer, tuple(response)) for ids, answer, response in rows]

    def collate(self, rows: list[Encoded], length: int = 0) -> Batch:
        """Pad examples on the right to the longest of them, or to `length` if that is more."""
        return self.template.collate(rows, length)

    def responses(self, rows: Sequence[Encoded]) -> torch.Tensor:
        """Return the tokens of each example's response [N, R], padded with NO_TOKEN."""
        return self.template.responses(rows)

    def texts_of(self, tokens_NR: torch.Tensor) -> list[str]:
        """Return the text of generated responses, which are padded with NO_TOKEN."""
        texts = []
        for tokens in tokens_NR.tolist():
            generated = [token for token in tokens if token != NO_TOKEN]
            texts.append(str(self.tokenizer.decode(generated)))
        return texts

    def scores(self, logits_BV: torch.Tensor) -> torch.Tensor:
        """Return the class scores [B, C] of logits over the vocabulary."""
        return self.verbalizer.scores(logits_BV)
