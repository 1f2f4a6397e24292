"""Remove documents that occur more than once from a tokenized corpus, in bounded memory.

Each part has a file with a digest of every document's text. The digests are sorted in buckets, so
that only one bucket is in memory at a time. The first of equal documents is kept.
"""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from post_dist.data.token_parts import PartRecord, digests_path, keep_documents, read_record
from post_dist.runtime.stop import leave_if_requested
from post_dist.runtime.watchdog import phase

_DOCUMENTS_IN_BUCKET = 1 << 20
_BUCKETS = 256
"""Most buckets, which are open files. A process may usually open 1,024."""


def without_duplicates(source: Path, parts: Sequence[PartRecord], target: Path) -> list[PartRecord]:
    """Write parts without duplicates into another folder. Parts that are there already stay.

    Args:
        source: folder of the parts and their digests.
        parts: the parts, in order.
        target: folder of the new parts.

    Returns:
        The records of the new parts.

    Raises:
        Interrupted: this process was asked to stop. Finished parts are kept.
    """
    with tempfile.TemporaryDirectory(dir=source, prefix=".buckets-") as scratch:
        is_duplicate = _find(source, parts, Path(scratch))
        written = []
        first = 0
        for part in parts:
            _report_and_stop_if_asked(f"removing duplicates from {part.name}")
            end = first + part.documents
            record = read_record(target / part.name)
            if record is None:
                record = keep_documents(source, part, ~is_duplicate[first:end], target)
            written.append(record)
            first = end
        return written


def _find(source: Path, parts: Sequence[PartRecord], scratch: Path) -> np.ndarray:
    """Return which documents are equal to an earlier one, as a memory map of flags."""
    documents = sum(part.documents for part in parts)
    is_duplicate = np.memmap(scratch / "flags", dtype=bool, mode="w+", shape=(max(documents, 1),))
    for bucket in _fill_buckets(source, parts, scratch, documents):
        _report_and_stop_if_asked("looking for duplicates")
        rows = np.fromfile(bucket, dtype=np.uint64).reshape(-1, 3)
        # The sort is stable and rows are in reading order, so the first of equal rows is kept.
        rows = rows[np.lexsort((rows[:, 1], rows[:, 0]))]
        repeats = (rows[1:, :2] == rows[:-1, :2]).all(axis=1)
        is_duplicate[rows[1:, 2][repeats]] = True
    return is_duplicate


def _fill_buckets(
    source: Path, parts: Sequence[PartRecord], scratch: Path, documents: int
) -> Iterator[Path]:
    """Sort the digests of all documents into files. A row has a digest and a document's number."""
    count = min(documents // _DOCUMENTS_IN_BUCKET + 1, _BUCKETS)
    paths = [scratch / str(number) for number in range(count)]
    with ExitStack() as stack:
        files = [stack.enter_context(path.open("wb")) for path in paths]
        first = 0
        for part in parts:
            _report_and_stop_if_asked(f"reading the digests of {part.name}")
            # A cut part has lost documents at its end.
            digests = np.load(digests_path(source / part.name))[: part.documents]
            numbers = np.arange(first, first + part.documents, dtype=np.uint64)
            rows = np.column_stack([digests, numbers])
            bucket_of_row = digests[:, 0] % np.uint64(count)
            for number, file in enumerate(files):
                file.write(rows[bucket_of_row == number].tobytes())
            first += part.documents
    return iter(paths)


def _report_and_stop_if_asked(doing: str) -> None:
    phase(doing)
    leave_if_requested("the finished parts of the tokenized corpus are kept")
