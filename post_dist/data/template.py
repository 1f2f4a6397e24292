"""Turn texts into the tokens that a model reads, by a template.

Shapes: B examples, N examples, R tokens of a response, T tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from post_dist.data.limited_tokenizer import with_limits
from post_dist.errors import InputError

NO_TOKEN = -100
"""Marks a position without a token; cross-entropy ignores it."""

_PROBE = "a"
"""A text of which each tokenizer makes tokens."""


@dataclass(frozen=True)
class Encoded:
    """One tokenized example.

    Attributes:
        token_ids: tokens of the templated text, followed by those of the response if there is one.
        answer: position at which the model predicts its answer, or the first token of a response.
        response: tokens of the response, which end with the end-of-text token.
    """

    token_ids: list[int]
    answer: int
    response: tuple[int, ...] = ()


@dataclass(frozen=True)
class Batch:
    """Examples padded on the right.

    Attributes:
        input_ids: tokens [B, T].
        attention_mask: mask [B, T]; 0 at padding.
        answer: position [B] at which the model answers.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    answer: torch.Tensor

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on a device."""
        return Batch(
            self.input_ids.to(device), self.attention_mask.to(device), self.answer.to(device)
        )


class Template:
    """A template bound to a tokenizer.

    Args:
        text: the template, with {text}, and with {mask} for a masked model. A masked model answers
            at the mask, and a causal model after the last token.
        tokenizer: a fast tokenizer.
        max_length: most tokens of a templated text; a longer text is cut at its beginning.
        max_response_length: most tokens of a response; a longer one is cut at its end.
        masked: whether the model is a masked one.
        vocabulary: number of tokens that the model has an embedding for. Some tokenizers know
            more; a text is read without them.

    Raises:
        InputError: the template does not suit the model, or leaves no room for text. Or the task
            generates text, and the tokenizer has no token that ends it.
        ArtifactRefused: the tokenizer cannot read the template.
    """

    def __init__(
        self,
        text: str,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        *,
        masked: bool,
        vocabulary: int,
        max_response_length: int = 0,
    ) -> None:
        _check_template(text, tokenizer, masked=masked)
        if masked and not _has_embedding(tokenizer.mask_token_id, vocabulary):
            raise InputError(
                "the tokenizer has no mask token that the model has an embedding for",
                "use a masked model whose tokenizer has one",
            )
        if max_response_length and not _has_embedding(tokenizer.eos_token_id, vocabulary):
            raise InputError(
                "the tokenizer has no end-of-text token that the model has an embedding for, "
                "and one ends each response",
                "use another model",
            )
        self._tokenizer = tokenizer
        self._masked = masked
        self._vocabulary = vocabulary
        self.max_length = max_length
        self.max_response_length = max_response_length

        # The template is split at {text} here, so braces in a text need no escape.
        mask_token = tokenizer.mask_token if masked else ""
        before, _, after = text.replace("{mask}", mask_token).partition("{text}")
        self._before = _without_double_braces(before)
        self._after = _without_double_braces(after)
        # A causal model would answer behind the tokens that end a text for this tokenizer.
        self._ends = 0 if masked else with_limits(lambda: _tokens_at_the_end(tokenizer), [_PROBE])
        # The special tokens of the tokenizer also count.
        tokens = with_limits(lambda: self._tokens(""), [text])
        if len(tokens) >= max_length:
            raise InputError(
                f"template {text!r} alone fills max_length ({max_length} tokens)",
                "raise max_length",
            )

    @property
    def longest(self) -> int:
        """Most tokens of an example with its response."""
        return self.max_length + self.max_response_length

    def first_tokens(self) -> list[int]:
        """Return the tokens before the text, or one that may stand before any text."""
        tokenizer = self._tokenizer
        before = self._tokens_of(self._before.rstrip())
        ends = [tokenizer.bos_token_id, tokenizer.eos_token_id]
        return before or self._known([token for token in ends if token is not None])[:1] or [0]

    def encode(self, texts: list[str], responses: Sequence[str] = ()) -> list[Encoded]:
        """Tokenize texts in the template.

        Args:
            texts: the texts.
            responses: a response to append to each text, or none.
        """
        encoded = [self._encode(text) for text in texts]
        if not responses:
            return encoded
        pairs = zip(encoded, responses, strict=True)
        return [self._with_response(example, response) for example, response in pairs]

    def responses(self, rows: Sequence[Encoded]) -> torch.Tensor:
        """Return the tokens of each example's response [N, R], padded with NO_TOKEN.

        R is the largest number of tokens that a response may have.
        """
        padded = []
        for row in rows:
            missing = self.max_response_length - len(row.response)
            padded.append([*row.response, *[NO_TOKEN] * missing])
        return torch.tensor(padded)

    def collate(self, rows: list[Encoded], length: int = 0) -> Batch:
        """Pad examples on the right. The real tokens of a causal model never attend to padding.

        Args:
            rows: the examples.
            length: pad to this length if it exceeds that of the longest example.
        """
        longest = max(length, *(len(row.token_ids) for row in rows))
        # The mask hides padding from a masked model. A causal model does not need it.
        input_ids = torch.full((len(rows), longest), self._padding_token())
        attention_mask = torch.zeros((len(rows), longest), dtype=torch.long)
        for index, row in enumerate(rows):
            input_ids[index, : len(row.token_ids)] = torch.tensor(row.token_ids)
            attention_mask[index, : len(row.token_ids)] = 1
        return Batch(input_ids, attention_mask, torch.tensor([row.answer for row in rows]))

    def _padding_token(self) -> int:
        """Return a valid token for padding. Any will do, because the model ignores padding."""
        tokenizer = self._tokenizer
        for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
            if _has_embedding(token, self._vocabulary):
                return int(token)
        return 0

    def _with_response(self, row: Encoded, text: str) -> Encoded:
        # A response follows other words, so it starts with a space.
        tokens = self._known(
            self._tokenizer(f" {text.strip()}", add_special_tokens=False, verbose=False).input_ids
        )
        # A cut leaves room for the end-of-text token, or the model would not learn to stop.
        response = (*tokens[: self.max_response_length - 1], self._tokenizer.eos_token_id)
        return Encoded([*row.token_ids, *response], row.answer, response)

    def _encode(self, text: str) -> Encoded:
        if self._masked:
            # A text may contain the mask token, but the model must answer at the template's mask.
            text = text.replace(self._tokenizer.mask_token, " ")
        tokens = self._tokens(text)
        # After a cut, the rest may be tokenized differently and still be too long.
        while len(tokens) > self.max_length:
            text = self._without_first_tokens(text, len(tokens) - self.max_length)
            tokens = self._tokens(text)
        # A tokenizer may make no token of a text, and the model needs one to answer behind.
        tokens = tokens or [self._padding_token()]
        # A causal model predicts the answer from the last token.
        answer = len(tokens) - 1
        if self._masked:
            answer = tokens.index(self._tokenizer.mask_token_id)
        return Encoded(tokens, answer)

    def _tokens(self, text: str) -> list[int]:
        # Not verbose, because a warning about a long text would show its length, which is private.
        return self._tokens_of(self._before + text + self._after)

    def _tokens_of(self, templated: str) -> list[int]:
        tokens = self._tokenizer(templated, verbose=False).input_ids
        return self._known(tokens[: len(tokens) - self._ends])

    def _known(self, tokens: list[int]) -> list[int]:
        """Return the tokens that the model has an embedding for."""
        return [token for token in tokens if token < self._vocabulary]

    def _without_first_tokens(self, text: str, count: int) -> str:
        """Cut the characters of the first tokens off a text.

        Characters are cut instead of tokens, because the template must keep its own tokens.
        """
        offsets = self._tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        ).offset_mapping
        # One character may be several tokens, so cut at the start of a later character.
        later_starts = (start for start, _ in offsets[count:] if start > 0)
        cut = next(later_starts, len(text))
        return text[cut:].lstrip()


def _check_template(text: str, tokenizer: PreTrainedTokenizerBase, *, masked: bool) -> None:
    if masked != ("{mask}" in text):
        problem = "a masked model needs {mask}" if masked else "{mask} is for masked models"
        raise InputError(f"template {text!r}: {problem}")
    if not masked and text != text.rstrip():
        raise InputError(
            f"template {text!r} ends in white space",
            "the label words carry the space before them",
        )
    if not tokenizer.is_fast:
        raise InputError(
            "the tokenizer is not a fast one, so long texts cannot be cut",
            "use a model with a tokenizer.json",
        )


def _has_embedding(token: int | None, vocabulary: int) -> bool:
    return token is not None and token < vocabulary


def _tokens_at_the_end(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return how many special tokens a tokenizer puts behind each text."""
    of_text = tokenizer(_PROBE, add_special_tokens=False).input_ids
    tokens = tokenizer(_PROBE).input_ids
    for start in range(len(tokens) - len(of_text) + 1):
        end = start + len(of_text)
        if tokens[start:end] == of_text:
            return len(tokens) - end
    return 0


def _without_double_braces(text: str) -> str:
    """Replace {{ and }} by single braces, as `str.format` does."""
    return text.replace("{{", "{").replace("}}", "}")
