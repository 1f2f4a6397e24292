"""Rows of a local file or a hub data set, as columns; local files leave no copy in any cache.

Every value is taken as it is written. A type that is chosen for a column depends on all of its rows, and then one row more may change
how every other reads: beside a row without a number, 30 is 30.0.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
from pyarrow import parquet

from post_dist.config.sources import DataSource, placeholders
from post_dist.errors import EnvironmentFault, InputError
from post_dist.runtime.watchdog import unwatched

_READERS: dict[str, Callable[[Path], pd.DataFrame]] = {
    ".csv": lambda path: _delimited(path, ","),
    ".tsv": lambda path: _delimited(path, "\t"),
    ".jsonl": lambda path: _as_written(_objects(path)),
    ".parquet": lambda path: _as_written(parquet.read_table(path).to_pydict()),
    ".txt": lambda path: pd.DataFrame({"text": path.read_text(encoding="utf-8").splitlines()}),
}


def read_columns(
    source: DataSource, columns: list[str], hub_split: str, where: str
) -> pd.DataFrame:
    """The named columns of a source, all rows, nothing missing.

    Args:
        source: the file or hub data set.
        columns: names of the columns that are needed; no other is kept.
        hub_split: which split of a hub data set; a file is always read whole.
        where: the run file's section, for messages.

    Raises:
        InputError: the file or a column is missing, or there is no row. Cell contents are never quoted.
        EnvironmentFault: the hub cannot be reached.
    """
    table = _read_file(source.path, where) if source.path else _read_hub(source, hub_split, where)
    for column in columns:
        if column not in table.columns:
            raise InputError(
                f"{where}: there is no column '{column}'",
                f"columns: {', '.join(map(str, table.columns))}",
            )
    table = table[columns].dropna()
    if table.empty:
        raise InputError(f"{where}: {source.path or source.hub} has no rows")
    return table


def texts_of(table: pd.DataFrame, text: str) -> list[str]:
    """Each row's text, made from its columns as `text` says."""
    names = placeholders(text)
    return [
        text.format(**dict(zip(names, row, strict=True))).strip()
        for row in table[names].map(str).itertuples(index=False)
    ]


def _as_written(rows: list[dict[str, Any]] | dict[str, list[Any]]) -> pd.DataFrame:
    return pd.DataFrame(rows, dtype=object)


def _objects(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines if line.strip()]
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError("not a JSON object on each line")
    return rows


def _delimited(path: Path, separator: str) -> pd.DataFrame:
    table = pd.read_csv(path, sep=separator, dtype=str, keep_default_na=False)
    if not isinstance(
        table.index, pd.RangeIndex
    ):  # made of the first column, and all names moved on by one
        raise ValueError("the first row has more fields than the header")
    return table


def _read_file(path: Path, where: str) -> pd.DataFrame:
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise InputError(
            f"{where}.path: {path.name} has no known ending", f"one of {', '.join(_READERS)}"
        )
    try:
        return reader(path)
    except (OSError, UnicodeError) as error:
        problem = (
            (error.strerror or "cannot be read")
            if isinstance(error, OSError)
            else "is not UTF-8 text"
        )
        raise InputError(f"{where}.path: {path}: {problem}") from None
    except (ValueError, RecursionError, pd.errors.ParserError):
        # The parser's own message may quote a row.
        problem = (
            "is empty"
            if os.path.getsize(path) == 0
            else f"cannot be read as {path.suffix[1:].upper()}"
        )
        raise InputError(f"{where}.path: {path} {problem}") from None


def _read_hub(source: DataSource, split: str, where: str) -> pd.DataFrame:
    from datasets import load_dataset  # slow to import, and not needed for files

    try:
        with unwatched(f"fetching {source.hub}"):  # the hub's client has time limits of its own
            rows: Any = load_dataset(
                source.hub, source.hub_config, revision=source.revision, split=split
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise EnvironmentFault(
            f"{where}.hub: cannot load {source.hub} ({split}): {error}"
        ) from None
    return _as_written(rows.with_format("arrow")[:].to_pydict())
