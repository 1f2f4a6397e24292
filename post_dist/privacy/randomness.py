"""Randomness that nobody can predict, and that only a resumed run can repeat.

A 256-bit key comes from the operating system's entropy. All random words are SHAKE-256 of the key
and of their purpose. A run that resumes after a kill therefore draws the same batch. It draws the
same noise only for the same clipped sum. The noise is a function of the sum: any other sum gets
independent noise.

The key stays in the owner's folder during the run. It is destroyed after the last step is saved,
because the key and the prompt together would allow subtracting the noise. The name of the run is
kept.
"""

import hashlib
import hmac
import json
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.special import ndtri

from post_dist.errors import ArtifactRefused
from post_dist.files import write_file

_KEY_BYTES = 32

# Bits of a uniform value. Values keep half a step of distance from 0 and 1, so the inverse normal
# distribution function is finite.
_UNIFORM_BITS = 52

# A sum of four draws defeats attacks on the lowest bits of one draw (arXiv 2107.10138).
_SUMMED = 4


@dataclass(frozen=True)
class RandomSource:
    """Source of random words from a secret key.

    Attributes:
        run: public name of the run that the key belongs to.
        key: the secret key. `repr` hides it. Empty after it was destroyed.
    """

    run: str
    key: bytes

    def __repr__(self) -> str:
        return f"RandomSource({self.run})"

    def words(self, count: int, *purpose: object) -> np.ndarray:
        """Return `count` uniform 64-bit words for a purpose.

        The same key and purpose give the same words.
        """
        # SHAKE-256 is an extendable-output function, so one digest can have any length.
        stream = hashlib.shake_256(self.key + self._message("words", *purpose)).digest(8 * count)
        return np.frombuffer(stream, dtype="<u8")

    def normal(self, count: int, *purpose: object) -> np.ndarray:
        """Return `count` standard normal values in fp64.

        Each is the scaled sum of four normal values. Inversion of uniform values gives these.
        """
        words = self.words(_SUMMED * count, "normal", *purpose)
        # Take the upper 52 bits of each word, and add half a step.
        uniform = ((words >> (64 - _UNIFORM_BITS)) + 0.5) * 2.0**-_UNIFORM_BITS
        values: np.ndarray = ndtri(uniform).reshape(_SUMMED, count).sum(axis=0) / _SUMMED**0.5
        return values

    def commitment(self, data: bytes, *purpose: object) -> str:
        """Return a keyed digest. It only tells whether data are the same as before."""
        # Without the key, nobody can use the digest to test a guess of the data.
        message = self._message("commitment", *purpose)
        return hmac.new(self.key, message + data, hashlib.sha256).hexdigest()

    def _message(self, *purpose: object) -> bytes:
        """Encode the purpose of random words.

        Raises:
            ArtifactRefused: the key has been destroyed.
        """
        if len(self.key) != _KEY_BYTES:
            raise ArtifactRefused(
                f"the key of run {self.run} has been destroyed, so it cannot resume",
                _start_over("its run folder"),
            )
        return json.dumps([str(part) for part in purpose]).encode()


def open_source(path: Path, noise_source: str, seed: int) -> RandomSource:
    """Open the random source of an unfinished run, or make a new one.

    Args:
        path: file that holds the key of the run. Only its owner can read it.
        noise_source: `system`, or `seeded`. A seeded key follows from the seed and is not secret.
        seed: used only by `seeded`.

    Raises:
        ArtifactRefused: the file does not hold a key.
        InputError: the file cannot be written.
        EnvironmentFault: the disk is full.
    """
    if path.exists():
        return _read(path)
    # Anyone can compute the key of a seed. This is only for tests.
    if noise_source == "system":
        key = secrets.token_bytes(_KEY_BYTES)
    else:
        key = hashlib.sha256(f"seeded {seed}".encode()).digest()
    # The name is random, so two runs of one run file are two runs in the ledger.
    source = RandomSource(secrets.token_hex(8), key)
    _write(path, source)
    return source


def destroy_key(path: Path, source: RandomSource) -> None:
    """Overwrite a run's key and keep its name.

    Copy-on-write storage may still hold the key.
    """
    with path.open("r+b") as old:
        # Replace the file first, so that a kill during the overwriting leaves a readable file.
        _write(path, RandomSource(source.run, b""))
        size = os.fstat(old.fileno()).st_size
        old.write(b"\0" * size)
        old.flush()
        os.fsync(old.fileno())


def _read(path: Path) -> RandomSource:
    """Read a key file.

    Raises:
        ArtifactRefused: the file is not the owner's alone, or holds no key.
    """
    try:
        # A link could lead to a file that somebody else has written.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW)) as file:
            status = os.fstat(file.fileno())
            text = file.read()
    except OSError as error:
        raise ArtifactRefused(
            f"cannot read the key {path}: {error.strerror}", _start_over(path.parent)
        ) from None
    # Whoever knows the key can subtract the noise, and whoever wrote it knows it.
    if status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise ArtifactRefused(
            f"the key {path} can be read or was written by others",
            _start_over(path.parent),
        )
    try:
        fields = json.loads(text)
        return RandomSource(str(fields["run"]), bytes.fromhex(fields["key"]))
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ArtifactRefused(
            f"{path} does not hold the key of a run", _start_over(path.parent)
        ) from None


def _start_over(run_folder: Path | str) -> str:
    """Return the hint for a run that cannot resume."""
    # `audit` tunes too, and has no such option.
    return f"delete {run_folder}, or run `post-dist tune` with --resume never"


def _write(path: Path, source: RandomSource) -> None:
    """Write a key file that only its owner can read."""

    def fill(partial: Path) -> None:
        # Create the file with its final mode, so that nobody else can ever open it.
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        descriptor = os.open(partial, flags, 0o600)
        with os.fdopen(descriptor, "w") as file:
            json.dump({"run": source.run, "key": source.key.hex()}, file)

    write_file(path, fill)
