"""Draft a run file for the owner of a table of labeled texts: `post-dist init --data`."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from post_dist.admission.door import described_student
from post_dist.artifacts.manifest import FILE_NAME
from post_dist.artifacts.task import PromptTask
from post_dist.config.presets import PRESETS, PresetName
from post_dist.config.sources import Task, is_label_name
from post_dist.data.sources import is_missing, read_table
from post_dist.data.verbalizer import Verbalizer
from post_dist.errors import InputError
from post_dist.models.facts import ModelFacts, read_facts
from post_dist.models.load import check_has_weights, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MOST_CLASSES = 50
_FEWEST_UNITS = 100
"""With fewer rows, or users, delta would be above the 0.01 that `verify` accepts."""
_MAX_LENGTH = 128
_TRAIN_SHARE = 0.8
_UNUSABLE = set('{}[].!:"\\')
"""Characters that a column's name may not have, because `text` is a format string."""
_SAYS_NOTHING = {"label", "labels", "class", "target", "y", "answer", "output"}
"""Names of a label column that are no word for what the model should answer."""
_ANSWERS = {"true": "yes", "false": "no"}
"""What the model answers to a question, by the label in lower case."""
_SPACES = ("Ġ", "▁")
"""Marks by which tokenizers write the space before a word."""

_FORMAT = """\
# Written by `post-dist init`. Change what does not suit you, then run `post-dist check` on it.
name: {name}
{inputs}
private_task:
  name: {name}
  visibility: private                # no message quotes the file
  path: {path}
  text: {text}
  label_column: {label}
{user}  # The values of the label column, and a word for each. Whoever gets the prompt reads them.
  # post_dist puts a space before each word{space}.
  labels:
{labels}
{note}  template: {template}
  max_length: {max_length:<22} # tokens of text and template; a longer text loses its beginning
  validation_share: 0.1              # 10% of the {units}, chosen by a hash
  test_share: 0.1                    # another 10%, which only `evaluate` reads
tune:
  num_virtual_tokens: {num_virtual_tokens}
{tune}privacy:                             # docs/privacy.md
  enabled: true
  target_epsilon: 8                  # the noise is chosen so that the run meets this
  # The number of training {units} is private. This is {share:.0%} of the {units}, rounded up to one
  # digit: put a number here that you would publish. delta becomes its power -1.1, {delta:.1e}.
  declared_examples: {declared}
  expected_batch_size: {batch_size}
  steps: {steps}
  learning_rate: {learning_rate}
  max_grad_norm: 1.0                 # gradients are clipped to this norm; choose it on public data
{cluster}"""
_USER = """\
  # Epsilon holds for all texts of a user together. declared_examples and expected_batch_size count
  # users.
  user_column: {user}
"""
_NO_USER = """\
  # If a user has several texts, write this file anew with `init --user COLUMN`: epsilon then holds
  # for all of them together.
"""


@dataclass(frozen=True)
class Columns:
    """The columns of a table that make its examples.

    Attributes:
        text: column of the texts.
        label: column of the labels.
        user: column with the user of each text; None if each text is protected by itself.
    """

    text: str
    label: str
    user: str | None = None


@dataclass(frozen=True)
class _Model:
    """The model that the prompt will be tuned on.

    Attributes:
        folder: its folder.
        facts: facts of the model.
        tokenizer: its tokenizer.
    """

    folder: Path
    facts: ModelFacts
    tokenizer: "PreTrainedTokenizerBase"


@dataclass(frozen=True)
class _LabelWords:
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


def draft_run(
    folder: Path,
    data: Path,
    text: str | None,
    label: str | None,
    user: str | None,
    model: Path | None,
    preset: PresetName = "laptop",
) -> str:
    """Draft a run file for private tuning on a table of labeled texts.

    Args:
        folder: folder of the run file.
        data: the table: a CSV, TSV, JSONL or Parquet file.
        text: column of the texts.
        label: column of the labels.
        user: column with the user of each text; None if no user has several.
        model: the student, or any other model to tune on; None to name it later.
        preset: name of the settings.

    Returns:
        The text of the run file.

    Raises:
        InputError: a column is not given or does not exist, the labels cannot be used, too few
            rows or users have one, or the model cannot be used.
    """
    # Everything that can be wrong with the table is found before a model is read.
    table = read_table(data, "--data")
    # Without rows, there is nothing to guess the columns from.
    if table.empty:
        raise InputError(
            f"--data: {data.name} has no rows",
            f"a private run needs {_FEWEST_UNITS} with a label, or more",
        )
    columns = _columns(table, data, text, label, user)
    table = table[[not is_missing(value) for value in table[columns.label]]]
    labels = _labels(table, columns.label)
    units = _units(table, columns)
    kind = "rows" if user is None else "users"
    if units < _FEWEST_UNITS:
        raise InputError(
            f"--data: {data.name} has fewer than {_FEWEST_UNITS} {kind} with a label",
            "a private run needs more",
        )
    known = None if model is None else _read_model(model)
    words = _label_words(labels, columns.label, known)
    # The label word follows the template, which therefore ends by asking for it.
    template = "{text}\n" + _question(columns.label, words)
    if known is not None and known.facts.masked:
        template += " {mask}"
    # Rounding hides the exact count, and rounding up keeps delta below one over that count.
    declared = _round_up(_TRAIN_SHARE * units)
    settings = PRESETS[preset]
    batch_size = min(settings.expected_batch_size, declared // 10)
    return _FORMAT.format(
        name=_quoted(_name(data)),
        inputs=_inputs(folder, known),
        path=_quoted(os.path.relpath(data.resolve(), folder.resolve())),
        text=_quoted(f"{{{columns.text}}}"),
        label=_quoted(columns.label),
        user=_NO_USER if user is None else _USER.format(user=_quoted(user)),
        units=kind,
        space=_space(words.tokens),
        labels=_label_lines(labels, words),
        note=_note(words),
        template=_quoted(template),
        max_length=_max_length(known, settings.num_virtual_tokens),
        num_virtual_tokens=settings.num_virtual_tokens,
        tune=_start(labels, words) + settings.tune,
        steps=settings.steps_for(declared, batch_size),
        learning_rate=settings.learning_rate,
        cluster=settings.cluster,
        share=_TRAIN_SHARE,
        declared=declared,
        delta=declared**-1.1,
        batch_size=batch_size,
    )


_MULTI = """\
  # Words of several tokens are allowed: the first token of each counts.
  allow_multi_token: true
"""
_LETTERS = """\
  # Letters, because labels begin with the same token. Words that say what the class is work better.
"""


def _columns(
    table: pd.DataFrame, data: Path, text: str | None, label: str | None, user: str | None
) -> Columns:
    """Return the columns that are given, or refuse with a guess of those that are missing."""
    # A column without a name in the file may have a number for a name.
    names = [str(name) for name in table.columns]
    listed = ", ".join(names)
    if text is None or label is None:
        guess = _guess(table)
        raise InputError(
            f"{data.name} has the columns {listed}",
            f"name two of them, perhaps --text '{guess.text}' --label '{guess.label}'",
        )
    for option, column in (("--text", text), ("--label", label), ("--user", user)):
        if column is not None and column not in names:
            raise InputError(
                f"{option}: {data.name} has no column '{column}'", f"columns: {listed}"
            )
    # `text` of the run file is a format string, in which these characters mean something else.
    if _UNUSABLE & set(text):
        raise InputError(
            f"--text: the name of column '{text}' has one of {' '.join(sorted(_UNUSABLE))}",
            "rename the column",
        )
    return Columns(text, label, user)


def _guess(table: pd.DataFrame) -> Columns:
    """Guess the columns: the longest values are texts, and the fewest different ones labels."""
    lengths = {str(name): table[name].map(str).map(len).mean() for name in table.columns}
    text = max(lengths, key=lambda name: lengths[name])
    others = [name for name in lengths if name != text] or [text]
    different = {name: table[name].map(str).nunique() for name in others}
    # A column with one value tells no classes apart.
    label = min(different, key=lambda name: (different[name] < 2, different[name]))
    return Columns(text, label)


def _units(table: pd.DataFrame, columns: Columns) -> int:
    """Return how many rows a table has, or how many users if epsilon holds for users."""
    if columns.user is None:
        return len(table)
    # As the stages count: a row whose user is null is left out.
    return int(table[columns.user].dropna().map(str).nunique())


def _labels(table: pd.DataFrame, column: str) -> list[str]:
    """Return the values of the label column, in a fixed order.

    Raises:
        InputError: a value cannot be a label, or there are too few or too many.
    """
    labels = sorted(set(table[column].map(str)))
    if not 2 <= len(labels) <= _MOST_CLASSES:
        raise InputError(
            f"--label: column '{column}' has {len(labels)} different values, and a task has 2 to "
            f"{_MOST_CLASSES} classes",
            "is it the column of the labels?",
        )
    if not all(map(is_label_name, labels)):
        raise InputError(
            f"--label: a value of column '{column}' is too long or not printable",
            "a label is at most 100 printable characters",
        )
    return labels


def _read_model(folder: Path) -> _Model:
    if not folder.is_dir():
        raise InputError(
            f"--model: {folder} is not a folder",
            "download a hub model first: hf download ORG/NAME --local-dir DIR",
        )
    # A folder without weights would only show when tuning starts.
    check_has_weights(folder)
    # A model with a manifest comes from another party.
    if not (folder / FILE_NAME).exists():
        return _Model(folder, read_facts(folder), load_tokenizer(folder))
    with described_student(folder) as inside:
        return _Model(folder, read_facts(inside), load_tokenizer(inside))


def _label_words(labels: Sequence[str], column: str, model: _Model | None) -> _LabelWords:
    """Propose a word for each class: the label itself, or a letter if two labels begin alike.

    Args:
        labels: the values of the label column.
        column: name of the label column.
        model: gives the tokens of the words; may be None.
    """
    lower = [label.strip().lower() for label in labels]
    # The name of a column of true and false asks a question, which yes and no answer.
    if _asked(column) is not None and set(lower) == set(_ANSWERS):
        lower = [_ANSWERS[word] for word in lower]
    written = [label.strip() for label in labels]
    letters = [_letters(number) for number in range(len(labels))]
    if model is None:
        proposed = lower if len(set(lower)) == len(lower) else written
        return _LabelWords(proposed, (), multi=True)
    # A single token is best, and a word that says something is better than a letter.
    for words, multi in ((lower, False), (written, False), (lower, True), (written, True)):
        found = _bound(words, model, multi=multi)
        if found is not None:
            return found
    for multi in (False, True):
        found = _bound(letters, model, multi=multi)
        if found is not None:
            return replace(found, letters=True)
    return _LabelWords(letters, (), multi=True, letters=True)


def _bound(words: Sequence[str], model: _Model, *, multi: bool) -> _LabelWords | None:
    """Bind words to the tokenizer. Return None if they cannot be told apart by their tokens."""
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
    return _LabelWords(words, tokens, multi)


def _letters(number: int) -> str:
    """Return A, B, ..., Z, and then AA, BB and so on."""
    return chr(ord("A") + number % 26) * (1 + number // 26)


def _note(words: _LabelWords) -> str:
    """Return the lines that follow the label words."""
    return (_LETTERS if words.letters else "") + (_MULTI if words.multi else "")


def _asked(column: str) -> str | None:
    """Return what the name of the label column asks for, or None if it says nothing."""
    # The name of the column is the owner's own word for the labels.
    word = column.replace("_", " ").strip()
    if word.lower() in _SAYS_NOTHING or not word.replace(" ", "").isalnum():
        return None
    return f"{word[0].upper()}{word[1:]}"


def _question(column: str, words: _LabelWords) -> str:
    """Return the end of the template, which the label word follows."""
    asked = _asked(column)
    if asked is None:
        return "Answer:"
    is_question = set(words.words) == set(_ANSWERS.values())
    return f"{asked}?" if is_question else f"{asked}:"


def _start(labels: Sequence[str], words: _LabelWords) -> str:
    """Return lines with a start for the prompt, if the default would not name the classes."""
    if not words.letters:
        return ""
    # A letter alone would tell the model nothing of the class.
    classes = {
        label: (f"{label} ({word})",) for label, word in zip(labels, words.words, strict=True)
    }
    section = Task(name="draft", visibility="private", path=Path("draft"), labels=classes)
    sentence = PromptTask.of_section(section, None).init_text
    return f"  init_text: {_quoted(sentence)}   # the prompt starts from these words\n"


def _space(tokens: Sequence[str]) -> str:
    """Return how the tokens show the space before a word, for a comment."""
    for mark in _SPACES:
        if any(token.startswith(mark) for token in tokens):
            return f": {mark} in its token"
    return ""


def _label_lines(labels: Sequence[str], words: _LabelWords) -> str:
    lines = []
    for number, (label, word) in enumerate(zip(labels, words.words, strict=True)):
        # Labels are quoted, because YAML would read 0 as a number and no as a word of its own.
        line = f"    {_quoted(label)}: [{_quoted(word)}]"
        if words.tokens:
            token = words.tokens[number]
            # A tokenizer is free in what its tokens hold, and a comment ends with its line.
            shown = token if token.isprintable() else ascii(token)
            line = f"{line:<36} # token {shown}"
        lines.append(line)
    return "\n".join(lines)


def _inputs(folder: Path, model: _Model | None) -> str:
    if model is None:
        return (
            "# Name the student here when you have it, then check the label words again:\n"
            "# inputs: {student: received/student}"
        )
    # Paths are read from the folder of the run file, so the two may be moved together.
    place = os.path.relpath(model.folder.resolve(), folder.resolve())
    lines = ["inputs:", f"  student: {_quoted(place)}   # the model that the prompt is tuned on"]
    if not (model.folder / FILE_NAME).exists():
        lines.append(f"  trust_model: true    # it has no {FILE_NAME}, so nobody has checked it")
    return "\n".join(lines)


def _max_length(model: _Model | None, num_virtual_tokens: int) -> int:
    """Return the default length, or what the context of the model leaves beside the prompt."""
    # It is no function of the texts, because it becomes part of the prompt.
    if model is None:
        return _MAX_LENGTH
    # Private tuning of a masked model keeps one position for padding.
    room = model.facts.context_length - num_virtual_tokens - 1
    return int(min(_MAX_LENGTH, room))


def _round_up(number: float) -> int:
    """Round up to one significant digit."""
    unit = 10 ** (len(str(int(number))) - 1)
    return int(-(-number // unit) * unit)


def _name(data: Path) -> str:
    """Return the name of the file as the name of a run: letters, digits, and . _ -."""
    kept = [each if _is_kept(each) else "-" for each in data.stem]
    return "".join(kept).strip("._-")[:64] or "run"


def _is_kept(character: str) -> bool:
    """Return whether the name of a run may have a character."""
    return character.isascii() and (character.isalnum() or character in "._-")


def _quoted(text: str) -> str:
    """Return a text in double quotes, as YAML and JSON both read it."""
    return json.dumps(text, ensure_ascii=False)
