"""Tables of lines whose fields a separator divides: CSV, where a field may be in quotes, and TSV.

A quote in the wrong place would join all lines up to the next one into a single field. One row more
in the file could then take a hundred others away, and epsilon counts rows. So a CSV file is read
only if each of its quotes belongs to a quoted field. A TSV file has no quoting, as its standard and
most programs have it: a quote is a character like any other.
"""

import csv
import io
import re
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import pandas as pd

ENCODING = "utf-8-sig"
"""UTF-8, for all files of texts. Some programs on Windows begin a file with a byte order mark."""

OPTIONS: dict[str, Any] = {"dtype": str, "keep_default_na": False}
"""Options of pandas with which each value is text, as it is written."""
TSV_OPTIONS = OPTIONS | {"sep": "\t", "quoting": csv.QUOTE_NONE}


class FileFault(ValueError):
    """A fault of a file. Its message quotes nothing of the file.

    Args:
        problem: what is wrong; it follows the path of the file.
        hint: what the user can do.
    """

    def __init__(self, problem: str, hint: str) -> None:
        super().__init__(problem)
        self.hint = hint


def csv_delimiter(header: bytes) -> str:
    """Return the delimiter of a CSV file: of comma, semicolon and tab the one most in its header.

    Only the header decides. Otherwise, one more example could change how all others are read.
    """
    # A quoted name may hold any character.
    unquoted = re.sub(rb'"[^"]*"', b"", header)
    # Of equally many, `max` takes the first: the comma.
    return max(",;\t", key=lambda separator: unquoted.count(separator.encode()))


def read_csv(path: Path) -> pd.DataFrame:
    """Read a CSV file whose first line has the names of the columns.

    Raises:
        ValueError: it is no such file.
    """
    text = _text_of(path)
    separator = csv_delimiter(re.split(rb"[\r\n]", text, maxsplit=1)[0])
    _check_quotes(text, separator)
    return _table(text, OPTIONS | {"sep": separator})


def read_tsv(path: Path) -> pd.DataFrame:
    """Read a TSV file whose first line has the names of the columns.

    Raises:
        ValueError: it is no such file.
    """
    return _table(_text_of(path), TSV_OPTIONS)


def _text_of(path: Path) -> bytes:
    """Return a file without its byte order mark, and without blank lines at its ends.

    Raises:
        UnicodeDecodeError: it is not UTF-8 text.
    """
    # In UTF-16, a quote would be found where none is.
    text = path.read_bytes().decode(ENCODING)
    return text.encode().strip(b"\r\n")


def _check_quotes(text: bytes, separator: str) -> None:
    """Refuse a quote in a field without quotes, and a quoted field that does not end.

    Raises:
        FileFault: there is one. The message names the line.
    """
    sep = re.escape(separator.encode())
    quoted = rb'"(?:[^"]++|"")*+"'
    field = re.compile(rb"(?:%b|[^\"%b\r\n]*+)(?:%b|\r\n?|\n|\Z)" % (quoted, sep, sep))
    place = 0
    while place < len(text):
        found = field.match(text, place)
        if found is None:
            line = text.count(b"\n", 0, place) + 1
            raise FileFault(
                f", line {line}: a quote is in a field without quotes, or a quoted field does not "
                "end",
                'put a text with quotes in quotes, and write each of its own twice: "a ""b"" c"',
            )
        place = found.end()


def check_distinct_names(names: Iterable[str]) -> None:
    """Refuse a table in which a name could stand for either of two columns.

    Raises:
        FileFault: two columns have the same name. It is not quoted.
    """
    # A column without a name is none that a run file could mean.
    named = [name for name in names if name]
    if len(set(named)) < len(named):
        raise FileFault(": two columns have the same name", "rename one of them")


def check_header(file: IO[bytes], options: dict[str, Any]) -> None:
    """Check the names of the columns in the first line of a file.

    Raises:
        ValueError: there is no such line, or two of them are equal.
    """
    # With a header, pandas would rename the second column.
    header = pd.read_csv(file, header=None, nrows=1, **options)
    check_distinct_names(header.iloc[0])


def _table(text: bytes, options: dict[str, Any]) -> pd.DataFrame:
    check_header(io.BytesIO(text), options)
    # A blank line between others is a row too. Otherwise the rows behind it would shift.
    table = pd.read_csv(io.BytesIO(text), skip_blank_lines=False, **options)
    # If rows have one field more than the header, pandas makes the first column an index. The names
    # of all other columns then shift by one.
    if not isinstance(table.index, pd.RangeIndex):
        raise ValueError("the first row has more fields than the header")
    return table
