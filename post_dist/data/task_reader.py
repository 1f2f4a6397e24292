"""A task bound to a tokenizer: it turns texts into tokens, and logits into class scores.

Shapes: B examples, C classes, N examples, R tokens of a response, V vocabulary.
"""

from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from post_dist.artifacts.task import PromptTask
from post_dist.data.limited_tokenizer import with_limits
from post_dist.data.template import NO_TOKEN, Batch, Encoded, Template
from post_dist.data.verbalizer import Verbalizer


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
        ArtifactRefused: the tokenizer cannot read the template or the words.
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
        self.template = Template(
            task.template,
            tokenizer,
            task.max_length,
            masked=masked,
            vocabulary=vocabulary,
            max_response_length=task.max_response_length,
        )
        self.verbalizer = Verbalizer(
            task.label_words,
            tokenizer,
            vocabulary=vocabulary,
            allow_multi_token=task.allow_multi_token,
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

        rows = with_limits(encode, [*texts, *used])
        return [Encoded(ids, answer, tuple(response)) for ids, answer, response in rows]

    def collate(self, rows: list[Encoded], length: int = 0) -> Batch:
        """Pad examples on the right to the longest of them, or to `length` if that is more."""
        return self.template.collate(rows, length)

    def responses(self, rows: Sequence[Encoded]) -> torch.Tensor:
        """Return the tokens of each example's response [N, R], padded with NO_TOKEN."""
        return self.template.responses(rows)

    def texts_of(self, tokens_NR: torch.Tensor) -> list[str]:
        """Return the text of generated responses, which are padded with NO_TOKEN."""
        rows = [[token for token in row if token != NO_TOKEN] for row in tokens_NR.tolist()]

        def decode() -> list[str]:
            return [str(self.tokenizer.decode(row)) for row in rows]

        texts: list[str] = with_limits(decode, [str(row) for row in rows])
        return texts

    def scores(self, logits_BV: torch.Tensor) -> torch.Tensor:
        """Return the class scores [B, C] of logits over the vocabulary."""
        return self.verbalizer.scores(logits_BV)
