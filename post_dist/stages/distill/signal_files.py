"""Files of teacher signals: where they are, what is in them, and whether they are undamaged.

A file holds the signals of a fixed range of places in the order in which training reads the corpus.
The place of a sequence therefore gives its file and its index in it, and nothing is looked up.
A file holds a digest of each sequence, so a reader checks exactly the bytes that it uses.

The disk may be too small for all files. Then they share slots in turn: with N slots, file F is
written in the slot of file F - N, which the student has read and which is removed first. The file
`first` says how far the student has read.

Shapes: B sequences, T tokens.
"""

import hashlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from post_dist.errors import EnvironmentFault
from post_dist.files import write_file, writing
from post_dist.stages.distill.first_read import read_first, write_first

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
        most: most files that may exist at the same time. None for no limit.

    Attributes:
        folder: the folder.
        limited: whether there is a limit.
        slots: number of slots, at most one file in each. Without a limit, each file has its own.
    """

    def __init__(self, folder: Path, places: int, most: int | None = None) -> None:
        self.folder = folder
        self.limited = most is not None
        self.slots = most or files_of(places)
        self._places = places
        # Files stay open between steps, because opening one parses its header.
        self._open = lru_cache(maxsize=_OPEN_FILES)(_open_file)

    def path(self, file: int) -> Path:
        """Return the path of a file by its number."""
        return self.folder / f"{self._subfolder(file):06d}" / _name(file)

    def slot(self, file: int) -> int:
        """Return the number of the slot of a file."""
        return file % self.slots

    def _subfolder(self, file: int) -> int:
        """Return the number of the subfolder of a file."""
        return self.slot(file) // _FILES_A_FOLDER

    def places(self, file: int) -> range:
        """Return the places whose signals a file holds."""
        first = file * SEQUENCES_A_FILE
        return range(first, min(first + SEQUENCES_A_FILE, self._places))

    def missing(self, first: int, count: int) -> Iterator[int]:
        """Yield the numbers from `first` to `count` of the files that do not exist.

        The names in a subfolder are listed once, so a file may appear while this runs.
        """
        listed = None
        present: set[str] = set()
        for file in range(first, count):
            # There may be a million files, so a path is made for each subfolder alone.
            if self._subfolder(file) != listed:
                listed = self._subfolder(file)
                folder = self.path(file).parent
                present = set(os.listdir(folder)) if folder.is_dir() else set()
            if _name(file) not in present:
                yield file

    def first_read(self) -> int:
        """Return the number of the first file that the student still reads; 0 before it starts.

        Raises:
            EnvironmentFault: the file that says so is damaged.
        """
        return read_first(self.folder, files_of(self._places))

    def write_first_read(self, first: int) -> None:
        """Write the number of the first file that the student still reads.

        Raises:
            InputError: the folder cannot be written to.
            EnvironmentFault: the disk is full.
        """
        write_first(self.folder, first)

    def empty_slot(self, file: int) -> None:
        """Remove other files in the slot of a file, and unfinished ones of dead processes.

        Nobody else may write in the slot.

        Raises:
            InputError: a file cannot be removed.
        """
        own = self.path(file)
        for path in own.parent.glob("*.safetensors"):
            number = int(path.name.split(".")[-2])
            if self.slot(number) == self.slot(file) and path != own:
                with writing(path):
                    path.unlink(missing_ok=True)

    def remove_all(self) -> None:
        """Remove all files, after the student has read the last one. Workers then make no more.

        Raises:
            InputError: a file cannot be removed.
            EnvironmentFault: the disk is full.
        """
        self.write_first_read(files_of(self._places))
        for path in self.folder.glob("*/*.safetensors"):
            with writing(path):
                path.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the files that are open. A removed file needs its space until then."""
        self._open.cache_clear()

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
            self.close()
            path.unlink(missing_ok=True)
            raise EnvironmentFault(
                f"{path} was damaged, and is removed", f"check the disk; {again}"
            )
        return tensors


def files_of(sequences: int) -> int:
    """Return the number of files that hold the first `sequences` places."""
    return -(-sequences // SEQUENCES_A_FILE)


def most_files_of_a_step(batch_size: int) -> int:
    """Return the largest number of files that hold the places of one step."""
    # A step may begin in the middle of a file, at a multiple of this number of places.
    shift = math.gcd(batch_size, SEQUENCES_A_FILE)
    return files_of(SEQUENCES_A_FILE - shift + batch_size)


def _name(file: int) -> str:
    """Return the name of a file by its number."""
    return f"{file:09d}.safetensors"


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
