"""Read tables from a local file or a hub data set. No copy of a local file is left in a cache.

Every value is read as it is written. A data type for a column would depend on all of its values.
One more example could then change all others: next to a missing number, 30 becomes 30.0.

To add a file type, write a function and add a line to `_READERS`.
"""

import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow
from pyarrow import ArrowException, parquet

from post_dist.config.sources import DataSource
from post_dist.data.delimited import (
    ENCODING,
    FileFault,
    check_distinct_names,
    check_encoding,
    read_csv,
    read_tsv,
)
from post_dist.errors import EnvironmentFault, InputError
from post_dist.paths import kind_of
from post_dist.runtime.watchdog import unwatched

PARSING_ERRORS = (
    ValueError,
    RecursionError,
    OverflowError,  # Python knows no date after the year 9999
    EOFError,
    zlib.error,
    ArrowException,
)
"""Errors of the parsers. Their messages may quote the file."""


def _read_jsonl(path: Path) -> pd.DataFrame:
    with path.open(encoding=ENCODING) as lines:
        # A blank line, such as one at the end of the file, is not an example.
        objects = [LINE_PARSER.decode(line) for line in lines if line.strip()]
    if not objects or not all(isinstance(found, dict) for found in objects):
        raise ValueError("not a JSON object on each line")
    if not all(map(has_whole_characters, objects)):
        raise FileFault(" holds half a character, such as \\ud83d", "write each character whole")
    return as_written(objects)


def _fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    # A lookup for each key would slow every line down.
    if len(fields) < len(pairs):
        raise FileFault(": an object has one key twice", "rename one of the two")
    return fields


LINE_PARSER = json.JSONDecoder(
    object_pairs_hook=_fields, parse_float=lambda written: _value_as_written(float(written))
)
"""Parser of a line of JSONL. It raises FileFault for a key that could stand for two values.

1.0 is 1, as in a column of floating-point numbers of Parquet.
"""


def has_whole_characters(found: dict[str, Any]) -> bool:
    """Return whether no string of a JSON object ends or begins in the middle of a character.

    An escape may stand for half of one, and no tokenizer takes that.
    """
    try:
        json.dumps(found, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_parquet(path: Path) -> pd.DataFrame:
    check_distinct_names(parquet.read_schema(path).names)
    return arrow_as_written(parquet.read_table(path))


def _read_lines(path: Path) -> pd.DataFrame:
    text = path.read_text(encoding=ENCODING)
    check_encoding(text.partition("\n")[0])
    return pd.DataFrame({"text": text.splitlines()})


_READERS: dict[str, Callable[[Path], pd.DataFrame]] = {
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
    ".txt": _read_lines,
}
"""The reader of each file type. A reader raises ValueError for a file that is not of its type."""


_HINTS = {
    ".csv": "write the names of the columns into the first line",
    ".tsv": "write the names of the columns into the first line",
    ".jsonl": "write one JSON object on each line",
}
"""What a file of each type must have, for messages."""


@dataclass(frozen=True)
class Rows:
    """The rows of a source that have no missing value.

    Attributes:
        numbers: number of each row in the source, from 1.
        texts: the text of each row, composed from its columns.
        answers: the value in the answer column of each row; empty if no answers were read.
        users: the value in the user column of each row; empty if no users were read.
    """

    numbers: list[int]
    texts: list[str]
    answers: list[str]
    users: list[str]


def read_rows(
    source: DataSource,
    hub_split: str,
    where: str,
    answer_column: str | None = None,
    user_column: str | None = None,
) -> Rows:
    """Read the texts of a source, and drop rows with a missing value.

    Args:
        source: the file or hub data set. Its field `text` says how a text is composed.
        hub_split: split of a hub data set; a file is always read whole.
        where: the run file's section, for messages.
        answer_column: column of labels or responses; None reads no answers.
        user_column: column with the person of each row; None reads no users.

    Raises:
        InputError: the file or a column is missing, or no row is left. Values are never quoted.
        EnvironmentFault: the hub cannot be reached.
    """
    table = _read_source(source, hub_split, where)
    others = [column for column in (answer_column, user_column) if column is not None]
    table = complete_rows(source, table, [*source.text_columns, *others], where)
    if user_column is not None:
        # Rows without a user would be those of one user, and in all splits.
        table = rows_with(table, user_column)
    if table.empty:
        raise InputError(f"{where}: {source.path or source.hub} has no rows")
    texts = compose_texts(source, table)
    numbers = [place + 1 for place in table.index]
    # White space makes no other user. `tasks.py` compares answers with the labels of the run file.
    users = [user.strip() for user in _strings(table, user_column)]
    return Rows(numbers, texts, _strings(table, answer_column), users)


def complete_rows(
    source: DataSource, table: pd.DataFrame, columns: list[str], where: str
) -> pd.DataFrame:
    """Return the rows of a table that have a value in each of some columns.

    Args:
        source: the section that the table was read for.
        table: the table.
        columns: names of the columns.
        where: the run file's section, for messages.

    Raises:
        InputError: a column is missing, or holds lists or mappings. Values are never quoted.
    """
    for column in columns:
        if column not in table.columns:
            raise _no_column(source, table, column, where)
        _check_values(table[column], f"{where}: column '{column}'")
    # An example without text or label cannot be used.
    return table.dropna(subset=columns)


def is_missing(value: object) -> bool:
    """Return whether a value is missing. In a CSV file, that is a field with nothing in it."""
    return value is None or value != value or not str(value).strip()


def rows_with(table: pd.DataFrame, column: str) -> pd.DataFrame:
    """Return the rows of a table whose value in a column is not missing."""
    return table.loc[[not is_missing(value) for value in table[column]]]


def _check_values(values: pd.Series, what: str) -> None:
    """Refuse a column with values that cannot be read as they were written.

    Args:
        values: the values of the column.
        what: the column, for the message.

    Raises:
        InputError: there is such a value. It is not quoted.
    """
    for value in values:
        # One more row could add a key to the mappings of all other rows.
        if isinstance(value, list | dict):
            raise InputError(
                f"{what} holds lists or mappings", "write each value as text or as a number"
            )
        if isinstance(value, _Unreadable):
            raise InputError(f"{what} holds {value.kind}", "write each value as text")


def compose_texts(source: DataSource, table: pd.DataFrame) -> list[str]:
    """Return the text of each row, composed from its columns as the field `text` says."""
    between = source.text_pieces
    # Values are converted to strings first, so 30 and "30" give the same text.
    texts = []
    for values in table[source.text_columns].map(str).itertuples(index=False):
        # A name may be a number or hold a dot, which `str.format` takes for something else.
        pieces = zip(between, [*values, ""], strict=True)
        texts.append("".join(literal + value for literal, value in pieces).strip())
    return texts


def read_column(path: Path, column: str, where: str) -> list[str]:
    """Read one column of a file, with a value for each row.

    Args:
        path: the file.
        column: name of the column.
        where: what the file is, for messages.

    Raises:
        InputError: the file or the column is missing, or a row has no value. Values are never
            quoted.
    """
    table = read_table(path, where)
    if column not in table.columns:
        raise InputError(
            f"{where}: {path.name} has no column '{column}' among {len(table.columns)} columns",
            # In a file without a header, the names of the columns are the first text.
            "name a column of the file's first line with --column",
        )
    _check_values(table[column], f"{where}: column '{column}'")
    # A row that was dropped would shift the answers to all rows after it.
    missing = table[column].isna().to_numpy().nonzero()[0]
    if len(missing):
        raise InputError(f"{where}: row {missing[0] + 1} has no value in column '{column}'")
    return table[column].map(str).tolist()


def _strings(table: pd.DataFrame, column: str | None) -> list[str]:
    """Return the values of a column as strings; none without a column."""
    return [] if column is None else table[column].map(str).tolist()


def _no_column(source: DataSource, table: pd.DataFrame, column: str, where: str) -> InputError:
    message = f"{where}: there is no column '{column}' among {len(table.columns)} columns"
    if source.is_private:
        # In a file without a header, the names of the columns are the first example.
        return InputError(message, f"compare {where} with the first line of the file")
    return InputError(message, f"columns: {', '.join(map(str, table.columns))}")


def _read_source(source: DataSource, hub_split: str, where: str) -> pd.DataFrame:
    if source.path:
        return read_table(source.path, f"{where}.path")
    return _read_hub(source, hub_split, where)


def as_written(rows: list[dict[str, Any]] | dict[str, list[Any]]) -> pd.DataFrame:
    """Make a table whose columns have no data type."""
    return pd.DataFrame(rows, dtype=object)


def arrow_as_written(table: pyarrow.Table) -> pd.DataFrame:
    """Undo what the data type of a column has done to its values."""
    columns = {}
    for name, values in zip(table.column_names, table.columns, strict=True):
        columns[name] = [_value_as_written(value) for value in values.to_pylist()]
    return as_written(columns)


@dataclass(frozen=True)
class _Unreadable:
    """A value that cannot be read as it was written. Only a column that is used is refused.

    Attributes:
        kind: what it is, for messages.
    """

    kind: str


def _value_as_written(value: object) -> object:
    """Return a value of an Arrow column as it would be in a column of its own.

    A missing value turns a column of integers into one of floating-point numbers. A value with
    more decimals gives all values of a decimal column as many.
    """
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, Decimal):
        return format(value.normalize(), "f")
    # Above this number, a column with a missing value would round it.
    if isinstance(value, int) and abs(value) > 2**53:
        return _Unreadable("whole numbers above 2^53")
    # Some programs do not mark text as text.
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return _Unreadable("bytes that are not UTF-8 text")
    return value


def read_table(path: Path, where: str) -> pd.DataFrame:
    """Read a file as it is written: its values have no data types.

    Args:
        path: the file; its suffix tells its type.
        where: what the file is, for messages.

    Raises:
        InputError: the file cannot be read. The message quotes nothing of it.
    """
    if kind_of(path) == "folder":
        raise InputError(f"{where}: {path.name} is a folder", "give a file")
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise InputError(
            f"{where}: {path.name} has no known file type", f"one of {', '.join(_READERS)}"
        )
    try:
        return reader(path)
    except OSError as error:
        problem = error.strerror or "cannot be read"
        raise InputError(f"{where}: {path}: {problem}") from None
    except UnicodeError:
        raise InputError(f"{where}: {path} is not UTF-8 text", "save it as UTF-8") from None
    except FileFault as fault:
        raise InputError(f"{where}: {path}{fault}", fault.hint) from None
    except PARSING_ERRORS:
        # The parser's own message is dropped, because it may quote an example.
        if path.stat().st_size == 0:
            raise InputError(f"{where}: {path} is empty") from None
        raise InputError(
            f"{where}: {path} cannot be read as {path.suffix[1:].upper()}",
            _HINTS.get(path.suffix.lower(), ""),
        ) from None


def _read_hub(source: DataSource, split: str, where: str) -> pd.DataFrame:
    rows = open_hub(source, split, where)
    return arrow_as_written(rows.with_format("arrow")[:])


def open_hub(source: DataSource, split: str, where: str, *, streaming: bool = False) -> Any:
    """Open a split of a hub data set.

    Args:
        source: names the data set.
        split: name of the split.
        where: the run file's section, for messages.
        streaming: fetch rows while they are read. Otherwise all are downloaded now.

    Raises:
        EnvironmentFault: the hub cannot be reached.
    """
    from datasets import load_dataset  # slow to import, and not needed for files

    try:
        # The hub's client has its own time limits.
        with unwatched(f"fetching {source.hub}"):
            # pyrefly: ignore[no-matching-overload]
            return load_dataset(
                source.hub,
                source.hub_config,
                revision=source.revision,
                split=split,
                streaming=streaming,
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise EnvironmentFault(
            f"{where}.hub: cannot load {source.hub} ({split}): {error}"
        ) from None
