"""Rows of a local file or a hub data set, as columns; local files leave no copy in any cache."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from post_dist.config.sources import DataSource, placeholders
from post_dist.errors import EnvironmentFault, InputError

_READERS: dict[str, Callable[[Path], pd.DataFrame]] = {
    ".csv": lambda path: pd.read_csv(path, dtype=str, keep_default_na=False),
    ".tsv": lambda path: pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False),
    ".jsonl": lambda path: pd.read_json(path, lines=True, dtype=False),
    ".parquet": pd.read_parquet,
    ".txt": lambda path: pd.DataFrame({"text": path.read_text(encoding="utf-8").splitlines()}),
}


def read_columns(source: DataSource, columns: list[str], hub_split: str, where: str) -> pd.DataFrame:
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
            raise InputError(f"{where}: there is no column '{column}'", f"columns: {', '.join(map(str, table.columns))}")
    table = table[columns].dropna()
    if table.empty:
        raise InputError(f"{where}: {source.path or source.hub} has no rows")
    return table


def texts_of(table: pd.DataFrame, text: str) -> list[str]:
    """Each row's text, made from its columns as `text` says."""
    names = placeholders(text)
    return [text.format(**dict(zip(names, row, strict=True))).strip() for row in table[names].astype(str).itertuples(index=False)]


def _read_file(path: Path, where: str) -> pd.DataFrame:
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise InputError(f"{where}.path: {path.name} has no known ending", f"one of {', '.join(_READERS)}")
    try:
        return reader(path)
    except (OSError, UnicodeError) as error:
        problem = (error.strerror or "cannot be read") if isinstance(error, OSError) else "is not UTF-8 text"
        raise InputError(f"{where}.path: {path}: {problem}") from None
    except (ValueError, pd.errors.ParserError):
        # The parser's own message may quote a row.
        problem = "is empty" if os.path.getsize(path) == 0 else f"cannot be read as {path.suffix[1:].upper()}"
        raise InputError(f"{where}.path: {path} {problem}") from None


def _read_hub(source: DataSource, split: str, where: str) -> pd.DataFrame:
    from datasets import load_dataset  # slow to import, and not needed for files

    try:
        rows: Any = load_dataset(source.hub, source.hub_config, revision=source.revision, split=split)
    except (OSError, ValueError, RuntimeError) as error:
        raise EnvironmentFault(f"{where}.hub: cannot load {source.hub} ({split}): {error}") from None
    return rows.to_pandas()
