"""Turn logits into class scores, by label words that are bound to a tokenizer.

Shapes: B examples, C classes, K tokens of all label words, V vocabulary.
"""

from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from post_dist.errors import InputError


class Verbalizer:
    """Scores a class by the mean logit of its label words.

    POST's code does the same, although the paper describes the mean probability.

    Args:
        label_words: words of each class.
        tokenizer: the model's tokenizer.
        allow_multi_token: whether a word may have several tokens. Its first token is then scored.

    Attributes:
        token_ids: tokens of the label words of each class.

    Raises:
        InputError: a word is several tokens, or belongs to two classes.
    """

    def __init__(
        self,
        label_words: tuple[tuple[str, ...], ...],
        tokenizer: PreTrainedTokenizerBase,
        *,
        allow_multi_token: bool,
    ) -> None:
        # Each class has a list of tokens, one for each of its words.
        self.token_ids: list[list[int]] = []
        for words in label_words:
            tokens = [_word_token(word, tokenizer, allow_multi_token) for word in words]
            self.token_ids.append(tokens)

        # A shared token would raise the scores of both classes. Words of one class may share one.
        first_use: dict[int, tuple[int, str]] = {}
        for index, words in enumerate(label_words):
            for word, token_id in zip(words, self.token_ids[index], strict=True):
                other_index, other_word = first_use.setdefault(token_id, (index, word))
                if other_index != index:
                    token = tokenizer.convert_ids_to_tokens(token_id)
                    raise InputError(
                        f"the label words '{other_word}' and '{word}' share the token '{token}'",
                        "choose words that begin differently, or letters",
                    )

    def lift(self, logits_BV: torch.Tensor, biases: Sequence[float]) -> torch.Tensor:
        """Add a bias to the score of each class, by adding it to the logits of its label words.

        Args:
            logits_BV: logits over the vocabulary.
            biases: one for each class; an empty sequence returns the logits unchanged.
        """
        if not biases:
            return logits_BV
        lifted = logits_BV.clone()
        for ids, bias in zip(self.token_ids, biases, strict=True):
            # Two words of a class may have the same token, which gets the bias only once.
            lifted[:, sorted(set(ids))] += bias
        return lifted

    @property
    def tokens(self) -> list[int]:
        """Tokens of all label words, class by class."""
        return [token for ids in self.token_ids for token in ids]

    def scores(self, logits_BV: torch.Tensor) -> torch.Tensor:
        """Return the class scores [B, C], in fp32 or in the wider type of the logits."""
        return self.scores_of_tokens(logits_BV[:, self.tokens])

    def scores_of_tokens(self, logits_BK: torch.Tensor) -> torch.Tensor:
        """Return the class scores [B, C] from the logits of `tokens` alone."""
        # A mean in half precision would lose small differences between classes.
        wide = torch.promote_types(logits_BK.dtype, torch.float32)
        parts = logits_BK.to(wide).split([len(ids) for ids in self.token_ids], dim=1)
        return torch.stack([part.mean(dim=1) for part in parts], dim=1)


def _word_token(word: str, tokenizer: PreTrainedTokenizerBase, allow_multi_token: bool) -> int:
    """Return the token that a word begins with when it follows another word.

    Byte-level and sentencepiece tokenizers use other tokens for a word at the start of a text.
    """
    # Tokenize the word after "a", then cut the tokens of "a" off.
    carrier = tokenizer("a", add_special_tokens=False).input_ids
    tokens = tokenizer(f"a {word.strip()}", add_special_tokens=False).input_ids[len(carrier) :]
    if len(tokens) != 1 and not allow_multi_token:
        pieces = " ".join(tokenizer.convert_ids_to_tokens(tokens))
        raise InputError(
            f"the label word '{word}' is {len(tokens)} tokens ({pieces})",
            "choose another word, or set allow_multi_token: true",
        )
    return int(tokens[0])
