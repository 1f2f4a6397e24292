"""The files of a corpus, their digests, and the units in which they are read.

To add a file type, write its reader in `data/documents.py`.
"""

import fnmatch
import glob
import os
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from pyarrow import parquet

from post_dist.artifacts.manifest import FILE_NAME
from post_dist.artifacts.run_folder import SETTINGS
from post_dist.config.sources import Corpus
from post_dist.data.sources import PARSING_ERRORS
from post_dist.errors import InputError
from post_dist.files import digest_as_read, digest_of, file_digest
from post_dist.runtime.stop import leave_if_requested
from post_dist.runtime.watchdog import phase

UNIT_BYTES = 12 << 20
"""Bytes of a file of lines that are read as one unit: fewer than a part takes."""

LINE_TYPES = (".txt", ".jsonl")
"""Types whose files can be read from any byte on, because a document is a line."""
TABLE_TYPES = (".csv", ".tsv", ".parquet")
COMPRESSIONS = (".gz", ".zst")
_RECORDS = (
    "*.ledger.jsonl",
    "*test_readings.jsonl",
    "private_metrics.jsonl",
    "metrics.jsonl",
    "[0-9]*_failures.jsonl",
)
"""Names of the files that post_dist writes about its runs and the data. They are no text."""


@dataclass(frozen=True)
class FileType:
    """The type of a file, by its name.

    Attributes:
        suffix: suffix of the uncompressed file, such as `.jsonl`.
        compression: `.gz`, `.zst`, or nothing.
    """

    suffix: str
    compression: str


@dataclass(frozen=True)
class Unit:
    """A piece of the corpus that can be read without the others.

    Attributes:
        path: the file; None for a hub data set.
        start: first byte of a range of lines, or number of a Parquet row group.
        stop: end of the range of bytes. A line belongs to the range that it begins in. None if the
            file is read to its end.
    """

    path: Path | None
    start: int = 0
    stop: int | None = None


def file_type(path: Path) -> FileType | None:
    """Return the type of a corpus file, or None if it is unknown."""
    name = Path(path.name.lower())
    compression = ""
    if name.suffix in COMPRESSIONS:
        compression = name.suffix
        name = name.with_suffix("")
    known = LINE_TYPES + TABLE_TYPES
    # Parquet compresses its own columns.
    if name.suffix not in known or (compression and name.suffix == ".parquet"):
        return None
    return FileType(name.suffix, compression)


def corpus_files(section: Corpus) -> list[Path]:
    """Return the files that `corpus.path` names, in reading order. A hub data set has none.

    The files of a folder or a pattern are sorted by their paths. Links are followed. Each file
    counts once, whatever links lead to it.

    Raises:
        InputError: there is no such file, its type is unknown, or it cannot be read.
    """
    if section.path is None:
        return []
    named = section.path
    if isinstance(named, Path):
        named = (named,)
    files: list[Path] = []
    for path in named:
        try:
            files += _files_at(path)
        except OSError as error:
            raise InputError(f"corpus.path: {error.filename}: {error.strerror}") from None
    return files


def _files_at(path: Path) -> list[Path]:
    if path.is_dir():
        # A folder may also hold other files, such as a README.
        found = [file for file in _matches(path, ["**", "*"]) if file_type(file) is not None]
    # A file's own name may have brackets.
    elif not path.exists() and glob.has_magic(str(path)):
        found = list(_matches(Path(path.anchor), path.relative_to(path.anchor).parts))
    else:
        return [_usable(path)]
    once: dict[str, Path] = {}
    for file in sorted(found):
        if not file.is_dir() and not _is_record(file):
            once.setdefault(os.path.realpath(file), file)
    return _not_empty([_usable(file) for file in once.values()], path)


def _matches(folder: Path, pattern: Sequence[str]) -> Iterator[Path]:
    """Find what matches a pattern, as `glob` does, but follow each link to a folder only once.

    Args:
        folder: where to search.
        pattern: the pattern of each part of a path below it. `**` stands for any folders.
    """
    if not pattern:
        yield folder
        return
    first, *rest = pattern
    if first == "**":
        for inner in _folders(folder):
            yield from _matches(inner, rest or ["*"])
    elif glob.has_magic(first):
        for entry in _entries(folder, first):
            yield from _matches(entry, rest)
    elif os.path.lexists(folder / first):
        yield from _matches(folder / first, rest)


def _folders(top: Path) -> Iterator[Path]:
    """Yield a folder and all folders below it, each real folder once."""
    seen = set()
    waiting = deque([top])
    while waiting:
        folder = waiting.popleft()
        real = os.path.realpath(folder)
        # A link may lead back to a folder above it.
        if real not in seen:
            seen.add(real)
            yield folder
            waiting += [entry for entry in _entries(folder, "*") if entry.is_dir()]


def _entries(folder: Path, pattern: str) -> list[Path]:
    """Return the entries of a folder that match a pattern. Runs and artifacts have none."""
    # A run writes its metrics while the next one lists the corpus. Some of them are private.
    is_made = any((folder / name).exists() for name in (SETTINGS, FILE_NAME))
    if is_made or not folder.is_dir():
        return []
    names = sorted(fnmatch.filter(os.listdir(folder), pattern))
    # The root of a disk has a folder that root alone may read.
    names = [name for name in names if name != "lost+found"]
    # Hidden folders hold caches and version control.
    return [folder / name for name in names if pattern.startswith(".") or name[0] != "."]


def _is_record(file: Path) -> bool:
    return any(file.match(pattern) for pattern in _RECORDS)


def _not_empty(files: list[Path], path: Path) -> list[Path]:
    if not files:
        known = ", ".join(LINE_TYPES + TABLE_TYPES)
        raise InputError(
            f"corpus.path: {path} has no file to read",
            f"file types: {known}; hidden files and those of runs and artifacts do not count",
        )
    return files


def _usable(path: Path) -> Path:
    if not path.is_file():
        problem = "not a file" if path.exists() else "No such file or directory"
        raise InputError(f"corpus.path: {path}: {problem}")
    if file_type(path) is None:
        raise InputError(
            f"corpus.path: {path.name} has no known file type",
            f"one of {', '.join(LINE_TYPES + TABLE_TYPES)}; all but .parquet also with "
            f"{' or '.join(COMPRESSIONS)}",
        )
    if _is_record(path):
        raise InputError(
            f"corpus.path: {path} has the name of a record of post_dist, which may be private",
            "rename it if it is public text",
        )
    return path


def source_digest(section: Corpus) -> str:
    """Return a digest of the contents of the corpus: those of its files, or the hub revision.

    Raises:
        InputError: a file cannot be read.
        Interrupted: this process was asked to stop.
    """
    if section.path is None:
        return f"{section.hub}@{section.revision}"
    # The names of the files do not count, so a moved corpus is still found.
    digests = []
    for path, digest in corpus_digests(section):
        found = file_type(path)
        digests.append(digest_as_read(digest, "" if found is None else found.suffix))
    # One file counts by its own digest, as the files of other sections do.
    return digests[0] if len(digests) == 1 else digest_of(digests)


def corpus_digests(section: Corpus) -> list[tuple[Path, str]]:
    """Return the files of the corpus with the sha256 of each.

    Raises:
        InputError: a file cannot be read.
        Interrupted: this process was asked to stop.
    """
    digests = []
    for file in corpus_files(section):
        try:
            state = file.stat()
            digest = _digest(file, state.st_size, state.st_mtime_ns)
        except OSError as error:
            raise InputError(f"corpus.path: {file}: {error.strerror}") from None
        # A list, because a file may be named twice, to count twice.
        digests.append((file, digest))
    return digests


@lru_cache(maxsize=100_000)
def _digest(file: Path, size: int, changed: int) -> str:
    """Hash a file. It is cached, because a run needs the digest of its corpus several times."""

    def between() -> None:
        phase(f"hashing {file}")
        # Hashing a large file takes minutes, and a job has seconds after a signal.
        leave_if_requested("no file of the corpus was changed")

    return file_digest(file, between)


def units_of(section: Corpus, unit_bytes: int = UNIT_BYTES) -> list[Unit]:
    """Divide the corpus into units, in reading order.

    Args:
        section: the section `corpus` of the run file.
        unit_bytes: bytes of a file of lines that make a unit.

    Raises:
        InputError: a file is missing or its type is unknown.
    """
    # A stream of the hub cannot be entered in the middle.
    if section.path is None:
        return [Unit(None)]
    units: list[Unit] = []
    for file in corpus_files(section):
        units += _units_of_file(file, unit_bytes)
    return units


def _units_of_file(file: Path, unit_bytes: int) -> list[Unit]:
    found = file_type(file)
    if found == FileType(".parquet", ""):
        return [Unit(file, group) for group in range(_row_groups(file))]
    # Nothing tells where a document begins in compressed text, or in CSV, which quotes line ends.
    if found is None or found.compression or found.suffix not in LINE_TYPES:
        return [Unit(file)]
    size = file.stat().st_size
    units = []
    for start in range(0, size, unit_bytes):
        units.append(Unit(file, start, min(start + unit_bytes, size)))
    return units


def _row_groups(file: Path) -> int:
    try:
        with parquet.ParquetFile(file) as table:
            return table.num_row_groups
    except (OSError, *PARSING_ERRORS):
        raise InputError(f"corpus.path: {file} cannot be read as PARQUET") from None
