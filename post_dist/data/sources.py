"""Read tables from a local file or a hub data set. No copy of a local file is left in a cache.

Every value is read as it is written. A data type for a column would depend on all of its values.
One more example could then change all others: next to a missing number, 30 becomes 30.0.

To add a file type, write a function and add a line to `_READERS`.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow
from pyarrow import parquet

from post_dist.config.sources import DataSource
from post_dist.errors import EnvironmentFault, InputError
from post_dist.runtime.watchdog import unwatched


def _read_csv(path: Path) -> pd.DataFrame:
    with path.open("rb") as file:
        header = file.readline()
    return _read_delimited(path, separator_of(header))


def _read_tsv(path: Path) -> pd.DataFrame:
    return _read_delimited(path, "\t")


def _read_jsonl(path: Path) -> pd.DataFrame:
    with path.open(encoding="utf-8") as lines:
        # A blank line, such as one at the end of the file, is not an example.
        objects = [json.loads(line) for line in lines if line.strip()]
    if not objects or not all(isinstance(found, dict) for found in objects):
        raise ValueError("not a JSON object on each line")
    # An escape such as "\ud800" is half a character, which no tokenizer takes.
    json.dumps(objects, ensure_ascii=False).encode()
    return as_written(objects)


def _read_parquet(path: Path) -> pd.DataFrame:
    return arrow_as_written(parquet.read_table(path))


def _read_lines(path: Path) -> pd.DataFrame:
    return pd.DataFrame({"text": path.read_text(encoding="utf-8").splitlines()})


_READERS: dict[str, Callable[[Path], pd.DataFrame]] = {
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
    ".txt": _read_lines,
}
"""The reader of each file type. A reader raises ValueError for a file that is not of its type."""


@dataclass(frozen=True)
class Rows:
    """The rows of a source that have no missing value.

    Attributes:
        texts: the text of each row, composed from its columns.
        answers: the value in the answer column of each row; empty if no answers were read.
        users: the value in the user column of each row; empty if no users were read.
    """

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
    if table.empty:
        raise InputError(f"{where}: {source.path or source.hub} has no rows")
    texts = compose_texts(source, table)
    return Rows(texts, _strings(table, answer_column), _strings(table, user_column))


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
        if any(isinstance(value, list | dict) for value in table[column]):
            # One more row could add a key to the mappings of all other rows.
            raise InputError(
                f"{where}: column '{column}' holds lists or mappings",
                "write each value as text or as a number",
            )
    # An example without text or label cannot be used.
    return table.dropna(subset=columns)


def is_missing(value: object) -> bool:
    """Return whether a value is missing. In a CSV file, that is a field with nothing in it."""
    return value is None or value != value or not str(value).strip()


def compose_texts(source: DataSource, table: pd.DataFrame) -> list[str]:
    """Return the text of each row, composed from its columns as the field `text` says."""
    names = source.text_columns
    # Values are converted to strings first, so 30 and "30" give the same text.
    texts = []
    for values in table[names].map(str).itertuples(index=False):
        texts.append(source.text.format(**dict(zip(names, values, strict=True))).strip())
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
            f"{where}: {path.name} has no column '{column}'",
            f"name one with --column: {', '.join(map(str, table.columns))}",
        )
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
    """Undo what the data type of a column has done to its values.

    Raises:
        ValueError: a column of integers holds one that a column of numbers could not.
    """
    columns = {}
    for name, values in zip(table.column_names, table.columns, strict=True):
        columns[name] = [_value_as_written(value) for value in values.to_pylist()]
    return as_written(columns)


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
        raise ValueError("an integer above 2^53")
    return value


def separator_of(header: bytes) -> str:
    """Return the separator of a CSV file: of comma, semicolon and tab the one most in its header.

    Only the header decides. Otherwise, one more example could change how all others are read.
    """
    # A quoted name may hold any character.
    unquoted = re.sub(rb'"[^"]*"', b"", header)
    # Of equally many, `max` takes the first: the comma.
    return max(",;\t", key=lambda separator: unquoted.count(separator.encode()))


def _read_delimited(path: Path, separator: str) -> pd.DataFrame:
    table = pd.read_csv(path, sep=separator, dtype=str, keep_default_na=False)
    # If rows have one field more than the header, pandas makes the first column an index. The names
    # of all other columns then shift by one.
    if not isinstance(table.index, pd.RangeIndex):
        raise ValueError("the first row has more fields than the header")
    return table


def read_table(path: Path, where: str) -> pd.DataFrame:
    """Read a file as it is written: its values have no data types.

    Args:
        path: the file; its suffix tells its type.
        where: what the file is, for messages.

    Raises:
        InputError: the file cannot be read. The message quotes nothing of it.
    """
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
        raise InputError(f"{where}: {path}: is not UTF-8 text", "save it as UTF-8") from None
    except (ValueError, RecursionError, OverflowError):
        # Python knows no date after the year 9999. The parser's own message is dropped, because it
        # may quote an example.
        if path.stat().st_size == 0:
            raise InputError(f"{where}: {path} is empty") from None
        hint = "put a text that holds a separator or a line end in quotes"
        raise InputError(
            f"{where}: {path} cannot be read as {path.suffix[1:].upper()}",
            hint if reader in (_read_csv, _read_tsv) else "",
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
