"""The text of a run file, from the owner's table and model."""

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from post_dist.artifacts.manifest import FILE_NAME
from post_dist.artifacts.task import start_sentence
from post_dist.config.presets import PRESETS, PresetName
from post_dist.config.stages import HEAD_DEFAULTS
from post_dist.data.sources import read_table
from post_dist.draft.columns import Columns, chosen_columns
from post_dist.draft.label_words import LabelWords, label_words, question
from post_dist.draft.labels import FEWEST_OF_LABEL, read_labels
from post_dist.draft.model import DraftModel, read_draft_model
from post_dist.errors import InputError
from post_dist.runtime.private_process import leave_no_core_dump, refuse_connections

log = logging.getLogger(__name__)

_MAX_LENGTH = 128
_TRAIN_SHARE = 0.8

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
{rare}{note}  template: {template}
  max_length: {max_length:<22} # tokens of text and template; a longer text loses its beginning
  validation_share: 0.1              # 10% of the {units}, chosen by a hash
  test_share: 0.1                    # another 10%, which only `evaluate` reads
tune:
{adapter}  num_virtual_tokens: {num_virtual_tokens}
{tune}{comparison}privacy:                             # docs/privacy.md
  enabled: true
  target_epsilon: 8                  # the noise is chosen so that the run meets this
  # The number of training {units} is private. This is {share:.0%} of the {units}, rounded up to one
  # digit: put a number here that you would publish. Whoever gets the prompt reads it, and what
  # follows from it: batch size, steps, and delta, which becomes its power -1.1, {delta:.1e}.
  declared_examples: {declared}
  expected_batch_size: {batch_size}
  steps: {steps}
  max_grad_norm: 1.0                 # gradients are clipped to this norm; choose it on public data
{learning_rate}{cluster}"""
_HEAD = """\
  # A linear classifier on the model's hidden states. `adapter: prompt` tunes a prompt of, say, 10
  # vectors instead: vLLM serves it, and it needs far more time and examples to become as good.
  adapter: head
"""
_COMPARISON = """\
  # Tells how many more validation rows are right than before, with this noise. Epsilon covers it.
  comparison_noise_multiplier: 20
"""
_FEWEST_COMPARED = 3000
"""With fewer declared examples, the noise of a comparison may hide any gain. They are rounded up to
one digit, so these are at least 2,001 training texts."""
_USER = """\
  # Epsilon holds for all texts of a user together. declared_examples and expected_batch_size count
  # users.
  user_column: {user}
"""
_NO_USER = """\
  # If a user has several texts, write this file anew with `init --user COLUMN`: epsilon then holds
  # for all of them together.
"""
_MULTI = """\
  # Words of several tokens are allowed: the first token of each counts.
  allow_multi_token: true
"""
_RARE = """\
    # Fewer than {fewest} {units} have each of these labels. In the prompt, its name would tell that
    # somebody has it, and so few examples teach little. Merge it with another label in your table,
    # and write this file anew. To publish it, remove the # before it, and put a word into [].
{lines}
"""
_LETTERS = """\
  # Letters, because labels begin with the same token. Words that say what the class is work better.
"""


@dataclass(frozen=True)
class Draft:
    """A drafted run file.

    Attributes:
        text: the text of the file.
        columns: the columns of the table that it names.
    """

    text: str
    columns: Columns


def draft_run(
    folder: Path,
    data: Path,
    text: str | None,
    label: str | None,
    user: str | None,
    model: Path | None,
    preset: PresetName = "laptop",
) -> Draft:
    """Draft a run file for private tuning on a table of labeled texts.

    Args:
        folder: folder of the run file.
        data: the table: a CSV, TSV, JSONL or Parquet file.
        text: column of the texts.
        label: column of the labels.
        user: column with the user of each text; None if no user has several.
        model: the student, or any other model to tune on; None to name it later.
        preset: name of the settings.

    Raises:
        InputError: a column is not given or does not exist, the labels cannot be used, too few
            texts or users have one, or the model cannot be used.
    """
    # Everything that can be wrong with the table is found before a model is read.
    leave_no_core_dump()
    refuse_connections()
    table = read_table(data, "--data")
    # Without rows, there is nothing to guess the columns from.
    if table.empty:
        raise InputError(
            f"--data: {data.name} has no rows",
            "a private run needs a hundred texts with a label, or more",
        )
    columns = chosen_columns(table, data, text, label, user)
    found = read_labels(data, columns)
    # The names of rare labels are not published unless the owner says so.
    labels = found.common
    known = None if model is None else read_draft_model(model)
    words = label_words(labels, columns.label, known)
    # The label word follows the template, which therefore ends by asking for it.
    template = "{text}\n" + question(columns.label, words)
    if known is not None and known.facts.masked:
        template += " {mask}"
    # Rounding hides the exact count, and rounding up keeps delta below one over that count.
    declared = _round_up(_TRAIN_SHARE * found.number_of_units)
    settings = PRESETS[preset]
    # A masked model has no head without a public prompt.
    has_head = settings.prefers_head and not (known is not None and known.facts.masked)
    usual = HEAD_DEFAULTS["batch_size"] if has_head else settings.expected_batch_size
    batch_size = min(usual, declared // 10)
    steps = HEAD_DEFAULTS["steps"] if has_head else settings.steps_for(declared, batch_size)
    if found.rare:
        log.warning(
            "labels that fewer than %d %s have: %d. A name would tell that somebody has it, so it "
            "is a comment in the run file: merge the label with another one in your table, or "
            "publish it as the comment says",
            FEWEST_OF_LABEL,
            columns.units,
            len(found.rare),
        )
    text_of_file = _FORMAT.format(
        name=_quoted(_name(data)),
        inputs=_inputs(folder, known),
        path=_quoted(os.path.relpath(data.resolve(), folder.resolve())),
        text=_quoted(f"{{{columns.text}}}"),
        label=_quoted(columns.label),
        user=_NO_USER if user is None else _USER.format(user=_quoted(user)),
        units="texts" if user is None else "users",
        space=_space(words),
        labels=_label_lines(labels, words),
        rare=_rare_lines(found.rare, columns),
        note=_note(words),
        template=_quoted(template),
        max_length=_max_length(known, settings.num_virtual_tokens),
        num_virtual_tokens=settings.num_virtual_tokens,
        adapter=_HEAD if has_head else "",
        # The template says little of the task, so a head gets the words that a prompt starts from.
        tune=_start(labels, words, needed=has_head or words.letters) + settings.tune,
        steps=steps,
        # The rate of a head follows from the noise of the plan.
        learning_rate="" if has_head else f"  learning_rate: {settings.learning_rate}\n",
        comparison=_comparison(declared, user),
        cluster=settings.cluster,
        share=_TRAIN_SHARE,
        declared=declared,
        delta=declared**-1.1,
        batch_size=batch_size,
    )
    return Draft(text_of_file, columns)


def _comparison(declared: int, user: str | None) -> str:
    """Return the lines for a comparison with the start, if it tells something."""
    # A comparison counts examples, and a user may have any number of them.
    if user is not None or declared < _FEWEST_COMPARED:
        return ""
    return _COMPARISON


def _note(words: LabelWords) -> str:
    """Return the lines that follow the label words."""
    return (_LETTERS if words.letters else "") + (_MULTI if words.multi else "")


def _space(words: LabelWords) -> str:
    """Return how the tokens show the space before a word, for a comment."""
    return "" if words.space_mark is None else f": {words.space_mark} in its token"


def _start(labels: Sequence[str], words: LabelWords, *, needed: bool) -> str:
    """Return lines with a start for the prompt, if the default would not do."""
    if not needed:
        return ""
    # A letter alone would tell the model nothing of the class.
    classes = [
        f"{label.strip()} ({word})" if words.letters else word
        for label, word in zip(labels, words.words, strict=True)
    ]
    sentence = start_sentence(classes)
    return f"  init_text: {_quoted(sentence)}   # the prompt starts from these words\n"


def _label_lines(labels: Sequence[str], words: LabelWords) -> str:
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


def _rare_lines(rare: Sequence[str], columns: Columns) -> str:
    """Return comments with the labels that would publish what few have; none if there are none."""
    if not rare:
        return ""
    lines = "\n".join(f"    # {_quoted(label)}: []" for label in rare)
    return _RARE.format(fewest=FEWEST_OF_LABEL, units=columns.units, lines=lines)


def _inputs(folder: Path, model: DraftModel | None) -> str:
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


def _max_length(model: DraftModel | None, num_virtual_tokens: int) -> int:
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
