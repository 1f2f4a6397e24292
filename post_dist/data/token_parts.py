"""Tokenize the units of a corpus into parts: files of about 16 MiB of text.

A part holds whole documents, each with a separator at its end. Where a part ends depends on the
text alone, not on the number of processes or on earlier starts. A part gets its name when it is
complete. Then its record, a small JSON file, is written beside it. A part without a record is made
again.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field
from safetensors import safe_open
from safetensors.numpy import save_file
from transformers import PreTrainedTokenizerBase

from post_dist.artifacts.strict_json import read_dataclass
from post_dist.config.sources import Corpus
from post_dist.data.corpus_files import Unit
from post_dist.data.documents import documents_of
from post_dist.files import file_digest, write_file

TOKENS = "tokens"
"""Name of the array with the tokens of a part, int32."""
DOCUMENT_LENGTHS = "document_lengths"
"""Name of the array with the number of tokens of each document, separator included, int32."""

_DIGEST_BYTES = 16
_PART_CHARACTERS = 16 << 20
_CHARACTERS_AT_ONCE = 1 << 20
"""Characters in one call of the tokenizer: less than a second of work, between two looks at
requests to stop."""
_DOCUMENTS_AT_ONCE = 1000
"""Documents in one call of the tokenizer."""


_Count = Annotated[int, Field(ge=0, lt=1 << 40)]
"""A number in a record. The tokens of all parts together fit 64 bits."""


@dataclass(frozen=True)
class PartRecord:
    """The record of a finished part.

    Attributes:
        unit: number of its unit.
        number: number of the part within the unit.
        tokens: number of its tokens, separators included.
        documents: number of its documents.
        size: bytes of its file.
        sha256: digest of its file.
        is_last: whether the unit ends with this part.
    """

    unit: _Count
    number: _Count
    tokens: _Count
    documents: _Count
    size: _Count
    sha256: str
    is_last: bool

    @property
    def name(self) -> str:
        """Name of the part's file."""
        return part_name(self.unit, self.number)


@dataclass(frozen=True)
class TokenizerWork:
    """What a process needs to tokenize any unit of a corpus.

    Attributes:
        section: the section `corpus` of the run file.
        tokenizer: the tokenizer.
        separator: token at the end of each document.
        folder: folder of the parts.
        units: the units, in reading order.
        part_characters: characters after which a part ends, at the end of a document.
    """

    section: Corpus
    tokenizer: PreTrainedTokenizerBase
    separator: int
    folder: Path
    units: list[Unit]
    part_characters: int = _PART_CHARACTERS


@dataclass(frozen=True)
class _Piece:
    """Documents for one call of the tokenizer."""

    documents: list[str]
    ends_part: bool
    is_last: bool = False


def part_name(unit: int, number: int) -> str:
    """Return the name of a part's file."""
    return f"part-{unit:06d}-{number:04d}.safetensors"


def tokenize_unit(work: TokenizerWork, number: int, between: Callable[[], None]) -> None:
    """Make the parts of a unit that are not finished.

    A unit that reaches `max_tokens` or `max_rows` alone ends there, because nothing after it is
    used.

    Args:
        work: the corpus and the tokenizer.
        number: number of the unit.
        between: function that is called before each piece of work. It may raise an error to stop.

    Raises:
        InputError: a file cannot be read.
    """
    finished = finished_parts(work.folder, number)
    if finished and finished[-1].is_last:
        return
    tokens_before = sum(part.tokens for part in finished)
    documents_before = sum(part.documents for part in finished)
    most_tokens = work.section.max_tokens or float("inf")

    # Documents of finished parts are read again, because nothing else tells where the next begins.
    documents = _polled(documents_of(work.section, work.units[number]), between)
    documents = islice(documents, documents_before, work.section.max_rows)
    part = _Part(work, number, len(finished))
    for piece in _pieces(documents, work.part_characters):
        between()
        part.add(piece.documents)
        is_last = piece.is_last or tokens_before + part.tokens >= most_tokens
        if piece.ends_part or is_last:
            part.write(is_last=is_last)
            tokens_before += part.tokens
            part = _Part(work, number, part.number + 1)
        # The rest of the unit is not read.
        if is_last:
            return


def finished_parts(folder: Path, unit: int) -> list[PartRecord]:
    """Return the records of a unit's finished parts, in order, up to the first one missing."""
    records: list[PartRecord] = []
    while record := read_record(folder / part_name(unit, len(records))):
        records.append(record)
    return records


def read_record(part: Path) -> PartRecord | None:
    """Return the record of a part, or None if the part is not finished."""
    try:
        record = read_dataclass(record_path(part), PartRecord)
        # A file of another size was cut off by a crash of the machine.
        is_complete = part.stat().st_size == record.size
    except (OSError, ValueError):
        return None
    return record if is_complete and record.name == part.name else None


def record_path(part: Path) -> Path:
    """Return the path of the record of a part."""
    return part.with_suffix(".json")


def digests_path(part: Path) -> Path:
    """Return the path of the digests of a part's documents, which `corpus.deduplicate` needs."""
    return part.with_suffix(".npy")


def cut_part(folder: Path, record: PartRecord, tokens: int, documents: int) -> PartRecord:
    """Cut a part, so that it ends where `max_tokens` or `max_rows` does.

    Args:
        folder: folder of the parts.
        record: the part.
        tokens: tokens to keep at most. The last document may lose its end.
        documents: documents to keep at most.

    Returns:
        The record of the cut part.
    """
    # The cut part replaces the whole one, so the index lists what is on the disk.
    with safe_open(folder / record.name, framework="numpy") as arrays:
        kept_tokens = arrays.get_tensor(TOKENS)
        lengths = arrays.get_tensor(DOCUMENT_LENGTHS)[:documents]
    kept_tokens = kept_tokens[: min(tokens, int(lengths.sum()))]
    # The documents end where the tokens do, and none of them is empty.
    ends = np.minimum(np.cumsum(lengths), len(kept_tokens))
    lengths = np.diff(ends, prepend=0).astype(np.int32)
    return _write(folder, record, kept_tokens, lengths[lengths > 0])


def keep_documents(source: Path, record: PartRecord, kept: np.ndarray, target: Path) -> PartRecord:
    """Write a part with some of its documents into another folder.

    Args:
        source: folder of the part.
        record: the part.
        kept: whether to keep each document, bool [documents].
        target: folder of the new part.

    Returns:
        The record of the new part.
    """
    with safe_open(source / record.name, framework="numpy") as arrays:
        tokens = arrays.get_tensor(TOKENS)
        lengths = arrays.get_tensor(DOCUMENT_LENGTHS)
    return _write(target, record, tokens[np.repeat(kept, lengths)], lengths[kept])


class _Part:
    """A part in memory.

    Args:
        work: the corpus and the tokenizer.
        unit: number of the unit.
        number: number of the part within the unit.
    """

    def __init__(self, work: TokenizerWork, unit: int, number: int) -> None:
        self.number = number
        self.tokens = 0
        self._work = work
        self._unit = unit
        # An array takes four bytes for each token, a list of Python integers nine times as many.
        self._arrays: list[np.ndarray] = []
        self._lengths: list[np.ndarray] = []
        self._digests = bytearray()

    def add(self, documents: list[str]) -> None:
        """Tokenize documents, and add their tokens."""
        # The last piece of a unit may be empty.
        if not documents:
            return
        token_lists = self._work.tokenizer(documents, add_special_tokens=False).input_ids
        arrays = []
        for tokens in token_lists:
            arrays.append(np.asarray([*tokens, self._work.separator], dtype=np.int32))
        # One array a piece, because an array a document would take more memory than its tokens.
        self._arrays.append(np.concatenate(arrays))
        self._lengths.append(np.asarray([len(each) for each in arrays], dtype=np.int32))
        self.tokens += len(self._arrays[-1])
        if self._work.section.deduplicate:
            for document in documents:
                text = document.encode("utf-8", "surrogatepass")
                self._digests += hashlib.blake2b(text, digest_size=_DIGEST_BYTES).digest()

    def write(self, *, is_last: bool) -> None:
        """Write the part and its record."""
        # np.concatenate refuses an empty list.
        nothing = np.empty(0, dtype=np.int32)
        tokens = np.concatenate([nothing, *self._arrays])
        lengths = np.concatenate([nothing, *self._lengths])
        record = PartRecord(self._unit, self.number, 0, 0, 0, "", is_last)
        if self._work.section.deduplicate:
            digests = np.frombuffer(self._digests, dtype=np.uint64).reshape(-1, 2)
            path = digests_path(self._work.folder / record.name)
            write_file(path, lambda partial: _save_array(partial, digests))
        _write(self._work.folder, record, tokens, lengths)


def _write(folder: Path, record: PartRecord, tokens: np.ndarray, lengths: np.ndarray) -> PartRecord:
    """Write a part and its record, which gets the counts and the digest. Return the record."""
    path = folder / record.name
    arrays = {TOKENS: tokens, DOCUMENT_LENGTHS: lengths}
    write_file(path, lambda partial: save_file(arrays, partial))
    written = PartRecord(
        record.unit,
        record.number,
        len(tokens),
        len(lengths),
        path.stat().st_size,
        file_digest(path),
        record.is_last,
    )
    text = json.dumps(asdict(written))
    # The record comes last, because it says that the part is complete.
    write_file(record_path(path), lambda partial: partial.write_text(text))
    return written


def _save_array(path: Path, array: np.ndarray) -> None:
    # Given a path, numpy would add a suffix to a temporary name.
    with path.open("wb") as file:
        np.save(file, array)


def _polled(documents: Iterator[str], between: Callable[[], None]) -> Iterator[str]:
    """Yield documents, and call a function now and then."""
    for number, document in enumerate(documents):
        if number % _DOCUMENTS_AT_ONCE == 0:
            between()
        yield document


def _pieces(documents: Iterator[str], part_characters: int) -> Iterator[_Piece]:
    """Group documents into pieces. The last piece may be empty."""
    piece: list[str] = []
    in_piece = 0
    in_part = 0
    for document in documents:
        piece.append(document)
        # Empty documents count too, because they have a separator.
        in_piece += len(document) + 1
        in_part += len(document) + 1
        ends_part = in_part >= part_characters
        is_full = in_piece >= _CHARACTERS_AT_ONCE or len(piece) == _DOCUMENTS_AT_ONCE
        if ends_part or is_full:
            yield _Piece(piece, ends_part)
            piece = []
            in_piece = 0
        if ends_part:
            in_part = 0
    yield _Piece(piece, ends_part=True, is_last=True)
