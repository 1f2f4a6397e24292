"""Read the texts to predict: a table, a file with one text a line, or standard input."""

import sys
from pathlib import Path

from post_dist.data.delimited import ENCODING, FileFault, check_encoding
from post_dist.data.sources import read_column
from post_dist.errors import InputError
from post_dist.runtime.private_process import leave_no_core_dump

STDIN = "-"
_WHERE = "texts"


def read_texts(source: str, column: str | None) -> list[str]:
    """Read texts, one for each row or line.

    Args:
        source: a CSV, TSV, JSONL or Parquet file, a text file with one text a line, or `-` for
            standard input with one text a line.
        column: column of a table; None for `text`.

    Raises:
        InputError: the file or the column is missing, a row has no text, or lines have no column.
            Texts are never quoted.
    """
    leave_no_core_dump()
    path = Path(source)
    if source != STDIN and path.suffix.lower() != ".txt":
        return read_column(path, column or "text", _WHERE)
    if column is not None:
        raise InputError(
            f"--column {column}: lines of text have no columns", "leave the option out"
        )
    try:
        content = sys.stdin.buffer.read() if source == STDIN else path.read_bytes()
        text = content.decode(ENCODING)
        check_encoding(text.partition("\n")[0])
    except OSError as error:
        raise InputError(f"{_WHERE}: {path}: {error.strerror or 'cannot be read'}") from None
    except UnicodeError:
        raise InputError(f"{_WHERE}: {source} is not UTF-8 text") from None
    except FileFault as fault:
        raise InputError(f"{_WHERE}: {source}{fault}", fault.hint) from None
    # Other tools count line feeds alone, so `splitlines`, which knows more ends, would shift lines.
    lines = text.split("\n")
    if not lines[-1]:
        lines.pop()
    return lines
