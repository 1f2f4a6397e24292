"""Sealed shards of a tokenized corpus: parts with tokens, and an index with their digests.

All students and runs share a folder of shards. It does not depend on the length of sequences, which
are slices of one stream of tokens.
"""

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from post_dist.artifacts.strict_json import dataclass_of, read_small
from post_dist.data.token_parts import TOKENS, PartRecord
from post_dist.errors import ArtifactRefused
from post_dist.files import digest_of, file_digest, write_file
from post_dist.runtime.stop import leave_if_requested
from post_dist.runtime.watchdog import phase

FORMAT_VERSION = 1
INDEX = "index.json"
"""Name of the index. With it, the shards are sealed."""
_MOST_INDEX_BYTES = 1 << 30
"""Size of the index of about 5 million parts."""
_OPEN_PARTS = 256
"""Parts that a reader keeps open. The usual limit of a process is 1,024 open files."""
_HASHING_THREADS = 8
"""Threads that hash parts. One thread hashes about 1.3 GB/s, less than many file systems give."""


@dataclass(frozen=True)
class ShardIndex:
    """The index of sealed shards.

    Attributes:
        contents: what the tokens depend on: sources, tokenizer, and settings.
        parts: the parts, in order.
    """

    contents: dict[str, Any]
    parts: list[PartRecord]

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return sum(part.tokens for part in self.parts)

    @property
    def documents(self) -> int:
        """Number of documents."""
        return sum(part.documents for part in self.parts)

    @property
    def digest(self) -> str:
        """Digest of the tokens, and of what they depend on."""
        return digest_of([self.contents, [asdict(part) for part in self.parts]])

    def write(self, folder: Path) -> None:
        """Write the index. The shards are sealed from then on."""
        text = json.dumps(self.fields(), indent=1) + "\n"
        write_file(folder / INDEX, lambda partial_file: partial_file.write_text(text))

    def fields(self) -> dict[str, Any]:
        """Return the fields of the index as they are written."""
        return {
            "version": FORMAT_VERSION,
            "contents": self.contents,
            "tokens": self.tokens,
            "documents": self.documents,
            "parts": [asdict(part) for part in self.parts],
            "digest": self.digest,
        }


def is_sealed(folder: Path) -> bool:
    """Return whether a folder has an index, and all the parts that it lists."""
    if not (folder / INDEX).exists():
        return False
    # A user deletes a damaged part to have it made again.
    return all((folder / part.name).exists() for part in read_index(folder).parts)


def read_index(folder: Path) -> ShardIndex:
    """Read the index of sealed shards.

    Raises:
        ArtifactRefused: it is not as it was written.
    """
    path = folder / INDEX
    try:
        fields = read_small(path, _MOST_INDEX_BYTES)
        parts = [dataclass_of(PartRecord, part) for part in fields["parts"]]
        index = ShardIndex(fields["contents"], parts)
        # Every field is compared, so that no flipped bit passes.
        if index.fields() == fields:
            return index
    # `parts` may be missing, or anything but a list of objects.
    except (OSError, ValueError, TypeError, KeyError):
        pass
    raise ArtifactRefused(
        f"{path} is not as it was written", f"delete {folder}; the next run makes it again"
    )


def check_parts(folder: Path, parts: Sequence[PartRecord]) -> None:
    """Compare parts with their digests.

    Raises:
        ArtifactRefused: a part is not as it was written.
        Interrupted: this process was asked to stop.
    """
    # hashlib releases the interpreter's lock, so threads suffice.
    threads = min(_HASHING_THREADS, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads) as pool:
        try:
            for _ in pool.map(partial(_check_part, folder), parts):
                pass
        finally:
            # After a refusal, the other parts need no check.
            pool.shutdown(cancel_futures=True)


def _check_part(folder: Path, part: PartRecord) -> None:
    leave_if_requested("the tokenized corpus is kept")
    phase("comparing the tokenized corpus with its hashes")
    path = folder / part.name
    try:
        is_whole = file_digest(path) == part.sha256
    except OSError:
        is_whole = False
    if not is_whole:
        raise ArtifactRefused(
            f"{path} is not as it was written: its sha256 differs",
            "check the disk, then delete this file; the next run makes it again",
        )


class TokenShards:
    """Reads the stream of tokens through memory maps.

    Args:
        folder: folder of sealed shards.

    Raises:
        ArtifactRefused: the index is not as it was written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index = read_index(folder)
        # A unit may end with a part without tokens, which no place is in.
        self._parts = [part for part in self.index.parts if part.tokens]
        counts = [part.tokens for part in self._parts]
        self._ends = np.cumsum(counts, dtype=np.int64)
        # Opening a part parses its header, so readers keep it open.
        self._open = lru_cache(maxsize=_OPEN_PARTS)(self._open_part)

    def __len__(self) -> int:
        return self.index.tokens

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return the tokens from place `start` to before `stop` of the stream, int32."""
        pieces = []
        # The first part that ends after the place holds it.
        number = int(np.searchsorted(self._ends, start, side="right"))
        # A sequence may begin in one part and end in another.
        while start < stop:
            part_end = int(self._ends[number])
            part_start = part_end - self._parts[number].tokens
            end = min(stop, part_end)
            pieces.append(self._open(number)[start - part_start : end - part_start])
            start = end
            number += 1
        return np.concatenate(pieces)

    def _open_part(self, number: int) -> Any:
        arrays: Any = safe_open(self.folder / self._parts[number].name, framework="numpy")
        return arrays.get_slice(TOKENS)
