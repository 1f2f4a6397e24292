"""Read the documents of a corpus in bounded memory: about a MiB of text, or some rows, at a time.

A document is composed as in `data/sources.py`, from a row of a table or a line of text.
"""

import gzip
import io
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import IO, Any, cast

import pandas as pd
import pyarrow
from pyarrow import parquet

from post_dist.config.sources import Corpus
from post_dist.data.corpus_files import Unit, file_type
from post_dist.data.delimited import (
    ENCODING,
    FileFault,
    check_distinct_names,
    check_encoding,
    layout_of,
    rows_of,
)
from post_dist.data.sources import (
    LINE_PARSER,
    PARSING_ERRORS,
    arrow_as_written,
    as_written,
    complete_rows,
    compose_texts,
    has_whole_characters,
    open_hub,
)
from post_dist.errors import InputError

_BLOCK_BYTES = 1 << 20
"""Bytes of lines that are read at once."""
_ROWS = 256
"""Rows of a table that are read at once. A row may hold a long document."""


def documents_of(section: Corpus, unit: Unit) -> Iterator[str]:
    """Yield the documents of a unit. Rows without a value are dropped.

    Args:
        section: the section `corpus` of the run file.
        unit: the unit, one of `units_of(section)`.

    Raises:
        InputError: a file is not of its type or lacks a column. The message names file and line.
        EnvironmentFault: the hub cannot be reached, or the package `datasets` is missing.
    """
    names = section.text_columns
    # A corpus may have thousands of files.
    where = "corpus" if unit.path is None else f"corpus.path: {unit.path}"
    is_first = unit.start == 0
    for table in _tables(section, unit):
        # A later line of a JSONL file may lack a column, as any line may. The first ones may not.
        if not is_first:
            table = table.reindex(columns=table.columns.union(names, sort=False))
        is_first = False
        yield from compose_texts(section, complete_rows(section, table, names, where))


def _tables(section: Corpus, unit: Unit) -> Iterator[pd.DataFrame]:
    if unit.path is None:
        yield from _hub_tables(section)
        return
    # The suffix of a compressed file is that of its contents.
    found = file_type(unit.path)
    suffix = "" if found is None else found.suffix
    try:
        yield from _READERS[suffix](section, unit)
    except OSError as error:
        problem = error.strerror or "cannot be read"
        raise InputError(f"corpus.path: {unit.path}: {problem}") from None
    except UnicodeError:
        raise InputError(f"corpus.path: {unit.path} is not UTF-8 text") from None
    except FileFault as fault:
        raise InputError(f"corpus.path: {unit.path}{fault}", fault.hint) from None
    except PARSING_ERRORS:
        # The parser's own message may quote a document of any length.
        raise InputError(
            f"corpus.path: {unit.path} cannot be read as {suffix[1:].upper()}"
        ) from None


# Lines of text.


def _text_tables(section: Corpus, unit: Unit) -> Iterator[pd.DataFrame]:
    for _, text in _blocks_of_lines(unit):
        yield pd.DataFrame({"text": text.splitlines()})


def _json_tables(section: Corpus, unit: Unit) -> Iterator[pd.DataFrame]:
    for place, text in _blocks_of_lines(unit):
        objects = []
        # Line ends are found as in a file that is opened as text.
        for number, line in enumerate(io.StringIO(text, newline=None)):
            # A blank line, such as one at the end of the file, is no document.
            if line.strip():
                objects.append(_parse_object(line, unit, place, number))
        yield as_written(objects)


def _parse_object(line: str, unit: Unit, place: int, number: int) -> dict[str, Any]:
    """Parse a line of a block.

    Args:
        line: the line.
        unit: the unit that is read.
        place: first byte of the block, for the message.
        number: number of the line in the block, from 0, for the message.
    """
    try:
        found = LINE_PARSER.decode(line)
    except FileFault as fault:
        number += _line_at(unit, place)
        raise FileFault(f", line {number}{fault}", fault.hint) from None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        number += _line_at(unit, place)
        raise InputError(f"corpus.path: {unit.path}, line {number}, is not a JSON object")
    # An escape of half a character is rare, and to look at all of a line takes time.
    if ("\\ud" in line or "\\uD" in line) and not has_whole_characters(found):
        number += _line_at(unit, place)
        raise InputError(
            f"corpus.path: {unit.path}, line {number}, holds half a character, such as \\ud83d",
            "write each character whole",
        )
    return found


def _blocks_of_lines(unit: Unit) -> Iterator[tuple[int, str]]:
    """Yield whole lines of a unit, and the place of their first byte in the uncompressed file."""
    with _open(unit) as file:
        place = unit.start
        # The line that a range begins in belongs to it only if it also begins there.
        if place:
            file.seek(place - 1)
            place += len(file.readline()) - 1
        while unit.stop is None or place < unit.stop:
            at_most = _BLOCK_BYTES
            if unit.stop is not None:
                at_most = min(at_most, unit.stop - place)
            block = file.read(at_most)
            if not block:
                return
            # A document is never cut, however long its line is.
            if not block.endswith(b"\n"):
                block += file.readline()
            yield place, _decode(block, unit, place)
            place += len(block)


def _decode(block: bytes, unit: Unit, place: int) -> str:
    try:
        # Only the beginning of a file can hold a byte order mark.
        text = block.decode("utf-8" if place else ENCODING)
    except UnicodeDecodeError as error:
        line = _line_at(unit, place + error.start)
        raise InputError(f"corpus.path: {unit.path}, line {line} is not UTF-8 text") from None
    if not place:
        check_encoding(text.partition("\n")[0])
    return text


def _line_at(unit: Unit, place: int) -> int:
    """Return the number of the line, from 1, that holds a byte of the uncompressed file."""
    # Lines are counted only for a message, because a range begins in the middle of a file.
    line = 1
    with _open(unit) as file:
        while place > 0:
            block = file.read(min(_BLOCK_BYTES, place))
            line += block.count(b"\n")
            place -= len(block)
    return line


def _open(unit: Unit) -> IO[bytes]:
    """Open the file of a unit, and decompress it."""
    path = cast(Path, unit.path)
    if path.suffix.lower() == ".gz":
        return cast(IO[bytes], gzip.open(path, "rb"))
    if path.suffix.lower() == ".zst":
        # pyarrow has zstd built in, and reads several frames that follow each other.
        stream: Any = pyarrow.CompressedInputStream(pyarrow.OSFile(str(path), "rb"), "zstd")
        return io.BufferedReader(stream)
    return path.open("rb")


# Tables.


def _csv_tables(section: Corpus, unit: Unit) -> Iterator[pd.DataFrame]:
    yield from _delimited(unit, ".csv")


def _tsv_tables(section: Corpus, unit: Unit) -> Iterator[pd.DataFrame]:
    yield from _delimited(unit, ".tsv")


def _delimited(unit: Unit, suffix: str) -> Iterator[pd.DataFrame]:
    with _open(unit) as file:
        if not cast(io.BufferedReader, file).peek(1):
            raise InputError(f"corpus.path: {unit.path} is empty")
    # A zstd stream has no way back.
    with _open_lines(unit) as lines:
        layout = layout_of(lines, suffix)
    with _open_lines(unit) as lines:
        names, rows = rows_of(lines, layout, blank_lines=False)
        # A table without rows may lack a column too.
        yield pd.DataFrame([], columns=names, dtype=object)
        while piece := list(islice(rows, _ROWS)):
            yield pd.DataFrame(piece, columns=names, dtype=object)


def _open_lines(unit: Unit) -> IO[str]:
    """Open the file of a unit as text. Line ends inside of quotes are kept."""
    return io.TextIOWrapper(cast(Any, _open(unit)), encoding=ENCODING, newline="")


def _parquet_tables(section: Corpus, unit: Unit) -> Iterator[pd.DataFrame]:
    with parquet.ParquetFile(unit.path) as file:
        check_distinct_names(file.schema_arrow.names)
        # Other columns are not read. A missing one is reported with the names of all others.
        names = section.text_columns
        if not set(names) <= set(file.schema_arrow.names):
            names = file.schema_arrow.names
        batches = file.iter_batches(
            batch_size=_ROWS, row_groups=[unit.start], columns=names, use_threads=False
        )
        # Values are converted one by one, so the size of a batch changes nothing.
        for batch in batches:
            yield arrow_as_written(pyarrow.Table.from_batches([batch]))


def _hub_tables(section: Corpus) -> Iterator[pd.DataFrame]:
    # Without a network, the data set must have been downloaded. It is then read from the disk.
    from datasets import config

    rows = open_hub(section, section.hub_split, "corpus", streaming=not config.HF_HUB_OFFLINE)
    for table in rows.with_format("arrow").iter(batch_size=_ROWS):
        yield arrow_as_written(table)


_READERS: dict[str, Callable[[Corpus, Unit], Iterator[pd.DataFrame]]] = {
    ".txt": _text_tables,
    ".jsonl": _json_tables,
    ".csv": _csv_tables,
    ".tsv": _tsv_tables,
    ".parquet": _parquet_tables,
}
