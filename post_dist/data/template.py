"""From a text to the tokens that a model reads, and from label words to the tokens that it answers with.

Shapes: B rows, T tokens, C classes, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from post_dist.errors import InputError

NO_TOKEN = -100
"""Stands where a row has no token; cross-entropy passes over it."""


@dataclass(frozen=True)
class Encoded:
    """One templated text.

    Attributes:
        token_ids: the template's, and those of the response if there is one.
        answer: where the model's answer stands, or the first token of its response is predicted.
        response: the tokens that are to follow, the end of the text last.
    """

    token_ids: list[int]
    answer: int
    response: tuple[int, ...] = ()


@dataclass(frozen=True)
class Batch:
    """Rows padded on the right: `input_ids` and `attention_mask` [B, T], `answer` [B]."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    answer: torch.Tensor

    def to(self, device: torch.device) -> "Batch":
        """The same rows on a device."""
        return Batch(
            self.input_ids.to(device), self.attention_mask.to(device), self.answer.to(device)
        )


class Template:
    """A template bound to a tokenizer.

    Args:
        text: holds {text}; for a masked model also {mask}, where the answer stands. Otherwise the answer follows the end.
        tokenizer: a fast tokenizer.
        max_length: most tokens of a templated text; a longer one loses its beginning.
        max_response_length: most tokens of a response behind it; a longer one loses its end.
        masked: whether the model fills in a mask.

    Raises:
        InputError: the template does not suit the model, or leaves no room for text.
    """

    def __init__(
        self,
        text: str,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        *,
        masked: bool,
        max_response_length: int = 0,
    ) -> None:
        if masked != ("{mask}" in text):
            raise InputError(
                f"template '{text}': {'a masked model needs {mask}' if masked else '{mask} is for masked models'}"
            )
        if not masked and text != text.rstrip():
            raise InputError(
                f"template '{text}' ends in white space",
                "the label words carry the space before them",
            )
        if not tokenizer.is_fast:
            raise InputError(
                "the tokenizer is not a fast one, so long texts cannot be cut",
                "use a model with a tokenizer.json",
            )
        self._tokenizer = tokenizer
        self._masked = masked
        before, _, after = text.replace("{mask}", tokenizer.mask_token if masked else "").partition(
            "{text}"
        )
        self._before, self._after = (
            before.replace("{{", "{").replace("}}", "}"),
            after.replace("{{", "{").replace("}}", "}"),
        )
        self.max_length, self.max_response_length = max_length, max_response_length
        if len(self._tokens("")) >= max_length:
            raise InputError(
                f"template '{text}' alone fills max_length ({max_length} tokens)",
                "raise max_length",
            )

    @property
    def longest(self) -> int:
        """Most tokens of a row, its response among them."""
        return self.max_length + self.max_response_length

    def encode(self, texts: list[str], responses: Sequence[str] = ()) -> list[Encoded]:
        """Tokens of each text in the template, and of the response behind each, if there are responses."""
        rows = [self._encode(text) for text in texts]
        return (
            [self._with_response(row, text) for row, text in zip(rows, responses, strict=True)]
            if responses
            else rows
        )

    def responses(self, rows: Sequence[Encoded]) -> torch.Tensor:
        """The tokens of each row's response, [B, R] with R the most that one may have; NO_TOKEN after its end."""
        return torch.tensor(
            [
                [*row.response, *[NO_TOKEN] * (self.max_response_length - len(row.response))]
                for row in rows
            ]
        )

    def _with_response(self, row: Encoded, text: str) -> Encoded:
        tokens = self._tokenizer(
            f" {text.strip()}", add_special_tokens=False, verbose=False
        ).input_ids
        response = (*tokens[: self.max_response_length - 1], self._tokenizer.eos_token_id)
        return Encoded([*row.token_ids, *response], row.answer, response)

    def _encode(self, text: str) -> Encoded:
        if self._masked:
            # The text may name the mask token itself; only the template's own mask asks for an answer.
            text = text.replace(self._tokenizer.mask_token, " ")
        tokens = self._tokens(text)
        while len(tokens) > self.max_length:
            text = self._without_first_tokens(text, len(tokens) - self.max_length)
            tokens = self._tokens(text)
        answer = tokens.index(self._tokenizer.mask_token_id) if self._masked else len(tokens) - 1
        return Encoded(tokens, answer)

    def _tokens(self, text: str) -> list[int]:
        # Not verbose: a warning of a text too long for the model would say how long a private one is.
        tokens: list[int] = self._tokenizer(
            self._before + text + self._after, verbose=False
        ).input_ids
        return tokens

    def _without_first_tokens(self, text: str, count: int) -> str:
        """The text without its first tokens; cut in the characters, so that the template's tokens stay as they are."""
        offsets = self._tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        ).offset_mapping
        # One character may be several tokens, so the cut moves on to where a later character begins.
        cut = next((start for start, _ in offsets[count:] if start > 0), len(text))
        return text[cut:].lstrip()

    def collate(self, rows: list[Encoded], length: int = 0) -> Batch:
        """Pad rows on the right, where a causal model's real tokens never look: to the longest, or to `length` if that is more."""
        longest = max(length, *(len(row.token_ids) for row in rows))
        padding = (
            self._tokenizer.pad_token_id
            if self._tokenizer.pad_token_id is not None
            else self._tokenizer.eos_token_id
        )
        input_ids = torch.full((len(rows), longest), padding or 0)
        attention_mask = torch.zeros((len(rows), longest), dtype=torch.long)
        for index, row in enumerate(rows):
            input_ids[index, : len(row.token_ids)] = torch.tensor(row.token_ids)
            attention_mask[index, : len(row.token_ids)] = 1
        return Batch(input_ids, attention_mask, torch.tensor([row.answer for row in rows]))
