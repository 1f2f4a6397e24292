"""A word for each class, and the question that it answers."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from post_dist.data.verbalizer import Verbalizer
from post_dist.draft.model import DraftModel
from post_dist.errors import InputError

_SAYS_NOTHING = {"label", "labels", "class", "target", "y", "answer", "output"}
"""Names of a label column that are no word for what the model should answer."""
_ANSWERS = {"true": "yes", "false": "no"}
"""What the model answers to a question, by the label in lower case."""
_SPACE_MARKS = ("Ġ", "▁")
"""Marks by which tokenizers write the space before a word."""


@dataclass(frozen=True)
class LabelWords:
    """A word for each class.

    Attributes:
        words: the words, in the order of the classes.
        tokens: the token of each word; empty without a tokenizer.
        multi: whether words may have several tokens.
        letters: whether the words are letters in place of the labels.
    """

    words: Sequence[str]
    tokens: Sequence[str]
    multi: bool
    letters: bool = False

    @property
    def space_mark(self) -> str | None:
        """The mark that stands for the space before a word in its token; None if there is none."""
        for mark in _SPACE_MARKS:
            if any(token.startswith(mark) for token in self.tokens):
                return mark
        return None


def label_words(labels: Sequence[str], column: str, model: DraftModel | None) -> LabelWords:
    """Propose a word for each class: the label itself, or a letter if two labels begin alike.

    Args:
        labels: the values of the label column.
        column: name of the label column.
        model: gives the tokens of the words; may be None.

    Raises:
        InputError: the model's tokenizer can tell neither the labels nor letters apart.
    """
    lower = [label.strip().lower() for label in labels]
    # The name of a column of true and false asks a question, which yes and no answer.
    if _asked(column) is not None and set(lower) == set(_ANSWERS):
        lower = [_ANSWERS[word] for word in lower]
    written = [label.strip() for label in labels]
    letters = [_letters(number) for number in range(len(labels))]
    # A single token is best, and a word that says something is better than a letter.
    for words, multi in (
        (lower, False),
        (written, False),
        (lower, True),
        (written, True),
        (letters, False),
        (letters, True),
    ):
        found = _bound(words, model, multi=multi)
        if found is not None:
            return replace(found, letters=words is letters)
    raise InputError(
        "--model: the model's tokenizer has no first token of its own for each label, nor for each "
        f"of the letters {letters[0]} to {letters[-1]}",
        "give another model; or write the run file without --model, name the model in `inputs`, "
        "and choose label words by the tokens that `check` lists",
    )


def _bound(words: Sequence[str], model: DraftModel | None, *, multi: bool) -> LabelWords | None:
    """Bind words to the tokenizer. Return None if they cannot be told apart by their tokens."""
    if model is None:
        # Whether a word is a single token shows when there is a tokenizer.
        is_distinct = len(set(words)) == len(words)
        return LabelWords(words, (), multi) if multi and is_distinct else None
    classes = tuple((word,) for word in words)
    try:
        verbalizer = Verbalizer(
            classes,
            model.tokenizer,
            vocabulary=model.facts.vocabulary,
            allow_multi_token=multi,
        )
    except InputError:
        return None
    tokens = [str(model.tokenizer.convert_ids_to_tokens(ids[0])) for ids in verbalizer.token_ids]
    return LabelWords(words, tokens, multi)


def _letters(number: int) -> str:
    """Return A, B, ..., Z, and then AA, BB and so on."""
    return chr(ord("A") + number % 26) * (1 + number // 26)


def _asked(column: str) -> str | None:
    """Return what the name of the label column asks for, or None if it says nothing."""
    # The name of the column is the owner's own word for the labels.
    word = column.replace("_", " ").strip()
    if word.lower() in _SAYS_NOTHING or not word.replace(" ", "").isalnum():
        return None
    return f"{word[0].upper()}{word[1:]}"


def question(column: str, words: LabelWords) -> str:
    """Return the end of the template, which the label word follows."""
    asked = _asked(column)
    if asked is None:
        return "Answer:"
    is_question = set(words.words) == set(_ANSWERS.values())
    return f"{asked}?" if is_question else f"{asked}:"
