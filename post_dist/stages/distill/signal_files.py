"""Files of teacher signals: where they are, what is in them, and whether they are undamaged.

A file holds the signals of a fixed range of places in the order in which training reads the corpus.
The place of a sequence therefore gives its file and its index in it, and nothing is looked up.
A file holds a digest of each sequence, so a reader checks exactly the bytes that it uses.

Shapes: B sequences, T tokens.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from post_dist.errors import EnvironmentFault
from post_dist.files import write_file

FORMAT = 2
"""Number of this format. The folder's name depends on it, so older files are never read."""
SEQUENCES_A_FILE = 64
"""Sequences in one file: few enough that an interruption loses little work."""
_FILES_A_FOLDER = 1000
"""Most files in one folder. Some file systems are slow with many more."""
_OPEN_FILES = 256
"""Files that a reader keeps open. The usual limit of a process is 1,024 open files."""
_DIGESTS = "sha256"
"""Key in the header of a file for the digests of its sequences."""


class SignalFiles:
    """The files of one folder.

    Args:
        folder: the folder.
        places: number of places in the reading order; the last file may be shorter.
    """

    def __init__(self, folder: Path, places: int) -> None:
        self.folder = folder
        self._places = places
        # Files stay open between steps, because opening one parses its header.
        self._open = lru_cache(maxsize=_OPEN_FILES)(_open_file)

    def path(self, file: int) -> Path:
        """Return the path of a file by its number."""
        return self.folder / f"{file // _FILES_A_FOLDER:06d}" / f"{file:09d}.safetensors"

    def places(self, file: int) -> range:
        """Return the places whose signals a file holds."""
        first = file * SEQUENCES_A_FILE
        return range(first, min(first + SEQUENCES_A_FILE, self._places))

    def missing(self, first: int, count: int) -> Iterator[int]:
        """Yield the numbers from `first` to `count` of the files that do not exist.

        The names in a subfolder are listed once, so a file may appear while this runs.
        """
        for start in range(first - first % _FILES_A_FOLDER, count, _FILES_A_FOLDER):
            subfolder = self.path(start).parent
            present = set(os.listdir(subfolder)) if subfolder.is_dir() else set()
            for file in range(max(first, start), min(start + _FILES_A_FOLDER, count)):
                if self.path(file).name not in present:
                    yield file

    def write(self, file: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write a file with the digests of its sequences.

        Several processes may write the same file at once. The last complete one stays.

        Args:
            file: its number.
            tensors: the signals of its places, each [B, T, ...] on the CPU.

        Raises:
            InputError: the folder cannot be written to.
            EnvironmentFault: the disk is full.
        """
        # One digest for a whole file would make every rank read all of it to check a few sequences.
        digests = []
        for index, place in enumerate(self.places(file)):
            sequence = {name: tensor[index] for name, tensor in tensors.items()}
            digests.append(_digest(place, sequence))
        header = {_DIGESTS: ",".join(digests)}
        write_file(self.path(file), lambda partial: save_file(dict(tensors), partial, header))

    def read(self, place: int, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """Read the tensors [1, T, ...] of one place, and check their digest.

        A damaged file is removed. The next run makes it again.

        Args:
            place: the place in the reading order.
            names: names of the tensors, which are all tensors of the file.

        Raises:
            EnvironmentFault: the file is missing or damaged.
        """
        file, index = divmod(place, SEQUENCES_A_FILE)
        path = self.path(file)
        again = "the same command makes this file again"
        try:
            content = self._open(path)
            # A slice reads only this sequence from the disk.
            tensors = {name: content.get_slice(name)[index : index + 1] for name in names}
            expected = content.metadata()[_DIGESTS].split(",")[index]
        except FileNotFoundError:
            raise EnvironmentFault(f"{path} is missing", again) from None
        # A flipped bit in the header can lead to any of these.
        except (SafetensorError, OSError, TypeError, KeyError, IndexError):
            expected, tensors = "", {}
        whole = _digest(place, {name: tensor[0] for name, tensor in tensors.items()})
        if whole != expected:
            # An open file would still be read after it is replaced.
            self._open.cache_clear()
            path.unlink(missing_ok=True)
            raise EnvironmentFault(
                f"{path} was damaged, and is removed", f"check the disk; {again}"
            )
        return tensors


def files_of(sequences: int) -> int:
    """Return the number of files that hold the first `sequences` places."""
    return -(-sequences // SEQUENCES_A_FILE)


def _digest(place: int, sequence: Mapping[str, torch.Tensor]) -> str:
    """Return the sha256 of the tensors [T, ...] of a sequence, and of its place."""
    # With the place, a file under another file's name is noticed too.
    digest = hashlib.sha256(f"{place}".encode())
    for name in sorted(sequence):
        digest.update(name.encode())
        # numpy has no bfloat16, so the bytes are hashed.
        digest.update(sequence[name].contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _open_file(path: Path) -> Any:
    return safe_open(path, framework="pt")
