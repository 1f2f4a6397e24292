"""Tables of lines whose fields a separator divides: CSV, where a field may be in quotes, and TSV.

A quote in the wrong place would join all lines up to the next one into a single field. One row more
in the file could then take a hundred others away, and epsilon counts rows. So a CSV file is read
only if each of its quotes belongs to a quoted field. A TSV file has no quoting, as its standard and
most programs have it: a quote is a character like any other.
"""

import csv
import io
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pandas as pd

ENCODING = "utf-8-sig"
"""UTF-8, for all files of texts. Some programs on Windows begin a file with a byte order mark."""

_SEPARATOR_LINE = re.compile(r'"?sep=([^\w\s"]|\t)"?[\r\n]*', re.IGNORECASE)
"""A line for Excel above the header. It names the separator."""
_QUOTED = re.compile(r'"(?:[^"]|"")*""(?:[^"]|"")*"')
"""A field as CSV writes it if it holds quotes: in quotes, and with each of its own twice."""

# A text may have any length. The limit of the module holds for the whole process.
csv.field_size_limit(sys.maxsize)


class FileFault(ValueError):
    """A fault of a file. Its message quotes nothing of the file.

    Args:
        problem: what is wrong; it follows the path of the file.
        hint: what the user can do.
    """

    def __init__(self, problem: str, hint: str) -> None:
        super().__init__(problem)
        self.hint = hint


@dataclass(frozen=True)
class Layout:
    """How the lines of a file make a table.

    Attributes:
        separator: the character between two fields.
        has_quotes: whether a field may be in quotes.
        lines_before: number of lines above the header.
    """

    separator: str
    has_quotes: bool
    lines_before: int


def layout_of(lines: Iterable[str], suffix: str) -> Layout:
    """Find the layout of a file. Only the lines up to the end of its header decide.

    Otherwise, one more example could change how all others are read.

    Args:
        lines: the lines, with their ends.
        suffix: `.csv` or `.tsv`.

    Raises:
        FileFault: the file is not UTF-8, or a TSV file names another separator.
    """
    declared = None
    lines_before = 0
    has_quotes = suffix == ".csv"
    header = []
    is_inside_quotes = False
    for line in lines:
        if not header:
            found = _SEPARATOR_LINE.fullmatch(line)
            if found is not None or not line.strip("\r\n"):
                declared = declared if found is None else found[1]
                lines_before += 1
                continue
        check_encoding(line)
        header.append(line)
        # A quoted name may hold line ends.
        is_inside_quotes ^= line.count('"') % 2 == 1
        if not has_quotes or not is_inside_quotes:
            break
    if has_quotes:
        separator = declared or _most_frequent_separator("".join(header))
        return Layout(separator, has_quotes, lines_before)
    if declared not in (None, "\t"):
        raise FileFault(": its first line names another separator than tabs", "name it .csv")
    return Layout("\t", has_quotes, lines_before)


def check_encoding(first_line: str) -> None:
    """Refuse a file whose first line holds NUL bytes. Each second byte of English in UTF-16 is one.

    Raises:
        FileFault: there is one.
    """
    if "\0" in first_line:
        raise FileFault(" is not UTF-8 text, but perhaps UTF-16", "save it as UTF-8")


def _most_frequent_separator(header: str) -> str:
    """Return which of comma, semicolon and tab a header has most of."""
    # A quoted name may hold any character.
    unquoted = re.sub('"[^"]*"', "", header)
    # Of equally many, `max` takes the first: the comma.
    return max(",;\t", key=unquoted.count)


def read_csv(path: Path) -> pd.DataFrame:
    """Read a CSV file whose first line has the names of the columns.

    Raises:
        ValueError: it is no such file.
    """
    text = _text_of(path)
    layout = layout_of(_lines(text), ".csv")
    _check_quotes(text, layout.separator)
    return _whole_table(text, layout)


def read_tsv(path: Path) -> pd.DataFrame:
    """Read a TSV file whose first line has the names of the columns.

    Raises:
        ValueError: it is no such file.
    """
    text = _text_of(path)
    return _whole_table(text, layout_of(_lines(text), ".tsv"))


def _text_of(path: Path) -> str:
    """Return a file without its byte order mark, and without blank lines at its end.

    Raises:
        UnicodeDecodeError: it is not UTF-8 text.
    """
    return path.read_bytes().decode(ENCODING).rstrip("\r\n")


def _lines(text: str) -> Iterator[str]:
    # Lines end as in a file, in a carriage return too. Those inside of quotes are kept.
    return io.StringIO(text, newline="")


def _whole_table(text: str, layout: Layout) -> pd.DataFrame:
    # A blank line between others is a row too. Otherwise the rows behind it would shift.
    names, rows = rows_of(_lines(text), layout, blank_lines=True)
    return pd.DataFrame(list(rows), columns=names, dtype=object)


def _check_quotes(text: str, separator: str) -> None:
    """Refuse a quote in a field without quotes, and a quoted field that does not end.

    Raises:
        FileFault: there is one. The message names the line.
    """
    sep = re.escape(separator)
    quoted = '"(?:[^"]++|"")*+"'
    field = re.compile(rf'(?:{quoted}|[^"{sep}\r\n]*+)(?:{sep}|\r\n?|\n|\Z)')
    place = 0
    while place < len(text):
        found = field.match(text, place)
        if found is None:
            raise _stray_quote(text.count("\n", 0, place) + 1)
        place = found.end()


def _stray_quote(line: int) -> FileFault:
    return FileFault(
        f", line {line}: a quote is in a field without quotes, or a quoted field does not end",
        'put a text with quotes in quotes, and write each of its own twice: "a ""b"" c"',
    )


def check_distinct_names(names: Iterable[str]) -> None:
    """Refuse a table in which a name could stand for either of two columns.

    Raises:
        FileFault: two columns have the same name. It is not quoted.
    """
    # A column without a name is none that a run file could mean.
    named = [name for name in names if name]
    if len(set(named)) < len(named):
        raise FileFault(": two columns have the same name", "rename one of them")


def rows_of(
    lines: Iterable[str], layout: Layout, *, blank_lines: bool
) -> tuple[list[str], Iterator[list[str]]]:
    """Return the names of a table's columns, and its rows. Each value is text, as it is written.

    Columns without a name are left out, so that none is taken for texts or labels.

    Args:
        lines: all lines of the file, with their ends.
        layout: see `layout_of`.
        blank_lines: whether a blank line is a row of empty fields, or none.

    Raises:
        ValueError: there is no header. While the rows are read: one has more or fewer fields than
            the header.
    """
    rows = _numbered(lines, layout)
    _, names = next(rows, (1, []))
    check_distinct_names(names)
    named = [place for place, name in enumerate(names) if name.strip()]
    if not named:
        raise ValueError("no column has a name")

    def values() -> Iterator[list[str]]:
        for line, row in rows:
            is_blank = not row or (len(row) == 1 and row[0].isspace())
            if is_blank and not blank_lines:
                continue
            _check_row(row, len(names), line, layout)
            # Only a blank row has fewer fields than the header.
            filled = row + [""] * (len(names) - len(row))
            yield [filled[place] for place in named]

    return [names[place] for place in named], values()


def _numbered(lines: Iterable[str], layout: Layout) -> Iterator[tuple[int, list[str]]]:
    """Yield the header and all rows, each with the number of the line that it begins in."""
    reader = csv.reader(
        islice(lines, layout.lines_before, None),
        delimiter=layout.separator,
        quoting=csv.QUOTE_MINIMAL if layout.has_quotes else csv.QUOTE_NONE,
        strict=True,
    )
    line = 1 + layout.lines_before
    try:
        for row in reader:
            yield line, row
            line = 1 + layout.lines_before + reader.line_num
    except csv.Error:
        raise _stray_quote(line) from None


def _check_row(row: list[str], width: int, line: int, layout: Layout) -> None:
    """Refuse a row that is not as wide as the header. Only a row without any text may be shorter.

    A field too few is mostly a text that was cut at a line end, and it could be any of the row's.

    Raises:
        FileFault: the row has more fields or fewer, or is quoted where the file has no quotes.
    """
    if not layout.has_quotes and any(map(_QUOTED.fullmatch, row)):
        raise FileFault(
            f", line {line}: a field is quoted as in CSV, and TSV has no quotes",
            "name the file .csv: its fields may also be separated by tabs",
        )
    if len(row) == width:
        return
    texts = "put a text that holds a separator or a line end in quotes"
    if not layout.has_quotes:
        texts = "write a text without tabs and line ends; name a file with quotes .csv"
    if len(row) > width:
        raise FileFault(
            f", line {line}: more fields than the header has",
            f"{texts}; name each column in the first line, if need be with an empty name",
        )
    if any(field.strip() for field in row):
        raise FileFault(
            f", line {line}: fewer fields than the header has",
            f"{texts}; write the separators of empty fields too; delete lines that are no rows",
        )
