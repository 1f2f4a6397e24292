"""Turn logits into class scores, by label words that are bound to a tokenizer.

Shapes: B examples, C classes, K tokens of all label words, V vocabulary.
"""

from collections.abc import Sequence
from itertools import chain

import torch
from transformers import PreTrainedTokenizerBase

from post_dist.data.limited_tokenizer import with_limits
from post_dist.errors import InputError, printable


class Verbalizer:
    """Scores a class by the mean logit of its label words.

    POST's code does the same, although the paper describes the mean probability.

    Args:
        label_words: words of each class.
        tokenizer: the model's tokenizer.
        vocabulary: number of tokens that the model has an embedding for.
        allow_multi_token: whether a word may have several tokens. Its first token is then scored.

    Attributes:
        token_ids: tokens of the label words of each class.

    Raises:
        InputError: a word is several tokens, has none of the model, or belongs to two classes.
        ArtifactRefused: the tokenizer cannot read the words.
    """

    def __init__(
        self,
        label_words: tuple[tuple[str, ...], ...],
        tokenizer: PreTrainedTokenizerBase,
        *,
        vocabulary: int,
        allow_multi_token: bool,
    ) -> None:
        all_words = list(chain.from_iterable(label_words))
        read = with_limits(lambda: [_tokens(word, tokenizer) for word in all_words], all_words)
        token_of = {}
        for word, tokens in zip(all_words, read, strict=True):
            if len(tokens) != 1 and not allow_multi_token:
                raise _several_tokens(word, tokenizer.convert_ids_to_tokens(tokens))
            # Some tokenizers know tokens that the model has no embedding for.
            # A word of unknown characters is the same token as any other such word.
            is_unknown = tokenizer.unk_token_id in tokens[:1]
            if not tokens or tokens[0] >= vocabulary or is_unknown:
                raise InputError(
                    f"the label word {word!r} has no token of the model", "choose another word"
                )
            token_of[word] = tokens[0]
        # Each class has a list of tokens, one for each of its words.
        self.token_ids = [[token_of[word] for word in words] for words in label_words]

        # A shared token would raise the scores of both classes. Words of one class may share one.
        first_use: dict[int, tuple[int, str]] = {}
        for index, words in enumerate(label_words):
            for word, token_id in zip(words, self.token_ids[index], strict=True):
                other_index, other_word = first_use.setdefault(token_id, (index, word))
                if other_index != index:
                    token = tokenizer.convert_ids_to_tokens(token_id)
                    # Letters may share a token too: that of the space before them.
                    are_letters = len(other_word) == len(word) == 1
                    raise InputError(
                        f"the label words {other_word!r} and {word!r} share the token {token!r}",
                        "choose words whose first tokens differ"
                        + ("" if are_letters else ", such as letters"),
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


def _tokens(word: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens of a word that follows another word.

    Byte-level and sentencepiece tokenizers use other tokens for a word at the start of a text.
    """
    # Tokenize the word after "a", then cut the tokens of "a" off.
    carrier = tokenizer("a", add_special_tokens=False).input_ids
    tokens: list[int] = tokenizer(f"a {word.strip()}", add_special_tokens=False).input_ids
    return tokens[len(carrier) :]


def _several_tokens(word: str, tokens: Sequence[str]) -> InputError:
    # A tokenizer is free in what its tokens hold, such as a line break.
    pieces = " ".join(map(printable, tokens))
    return InputError(
        f"the label word {word!r} is {len(tokens)} tokens ({pieces})",
        "choose another word, or set allow_multi_token: true",
    )
