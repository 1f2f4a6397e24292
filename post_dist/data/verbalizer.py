"""Label words bound to a tokenizer.

Shapes: B rows, C classes, K tokens of all label words, V vocabulary.
"""

from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from post_dist.errors import InputError


class Verbalizer:
    """Class scores: the mean logit of each class's label words (POST's code; its paper says mean probability).

    Args:
        label_words: for each class its words.
        tokenizer: the model's.
        allow_multi_token: judge a word of several tokens by its first.

    Raises:
        InputError: a word is several tokens, or stands for two classes.
    """

    def __init__(
        self,
        label_words: tuple[tuple[str, ...], ...],
        tokenizer: PreTrainedTokenizerBase,
        *,
        allow_multi_token: bool,
    ) -> None:
        self.token_ids = [
            [_word_token(word, tokenizer, allow_multi_token) for word in words]
            for words in label_words
        ]
        owner: dict[int, int] = {}
        for index, ids in enumerate(self.token_ids):
            for token_id in set(ids):
                if owner.setdefault(token_id, index) != index:
                    token = tokenizer.convert_ids_to_tokens(token_id)
                    raise InputError(
                        f"the label words of classes {owner[token_id]} and {index} share the token '{token}'"
                    )

    def lift(self, logits_BV: torch.Tensor, biases: Sequence[float]) -> torch.Tensor:
        """Logits [B, V] with each class's label words raised by the class's bias, and so its score; none given, none raised."""
        lifted = logits_BV.clone() if biases else logits_BV
        for ids, bias in zip(self.token_ids, biases, strict=bool(biases)):
            lifted[:, sorted(set(ids))] += bias
        return lifted

    @property
    def tokens(self) -> list[int]:
        """Those of all label words, class by class."""
        return [token for ids in self.token_ids for token in ids]

    def scores(self, logits_BV: torch.Tensor) -> torch.Tensor:
        """[B, C] in fp32, or in fp64 where the logits are."""
        return self.scores_of_tokens(logits_BV[:, self.tokens])

    def scores_of_tokens(self, logits_BK: torch.Tensor) -> torch.Tensor:
        """The same from the logits of `tokens` alone."""
        wide = torch.promote_types(logits_BK.dtype, torch.float32)
        parts = logits_BK.to(wide).split([len(ids) for ids in self.token_ids], dim=1)
        return torch.stack([part.mean(dim=1) for part in parts], dim=1)


def _word_token(word: str, tokenizer: PreTrainedTokenizerBase, allow_multi_token: bool) -> int:
    """The token that a word begins with when it follows another word."""
    carrier = tokenizer("a", add_special_tokens=False).input_ids
    tokens = tokenizer(f"a {word.strip()}", add_special_tokens=False).input_ids[len(carrier) :]
    if len(tokens) != 1 and not allow_multi_token:
        pieces = " ".join(tokenizer.convert_ids_to_tokens(tokens))
        raise InputError(
            f"the label word '{word}' is {len(tokens)} tokens ({pieces})",
            "choose another word, or set allow_multi_token: true",
        )
    return int(tokens[0])
