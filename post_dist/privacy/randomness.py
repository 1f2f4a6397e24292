"""Randomness that nobody can predict and that a killed run can repeat for the same gradient, and for that one alone.

A 256-bit key comes from the operating system's entropy. All random words are SHAKE-256 of the key and of what they are for, so
that they are functions of the key: a run that goes on after a kill draws the same batch, and for the same clipped sum the same
noise. The noise is a function of the sum itself: another sum, from whatever cause, gets noise that is independent.
The key is kept in the owner's folder while the run lasts and destroyed when its last step is saved, because whoever has the
key and the prompt could take the noise off again; the run's name stays.
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
_UNIFORM_BITS = 52
_SUMMED = 4
"""Each normal value is the sum of this many, scaled: attacks on the lowest bits of one floating-point draw fail (arXiv 2107.10138)."""


@dataclass(frozen=True)
class RandomSource:
    """Words from a secret key.

    Attributes:
        run: a public name of the run that the key belongs to.
        key: the secret; never shown. Empty when it has been destroyed.
    """

    run: str
    key: bytes

    def __repr__(self) -> str:
        return f"RandomSource({self.run})"

    def words(self, count: int, *purpose: object) -> np.ndarray:
        """`count` uniform 64-bit words for a purpose; the same key and purpose always give the same."""
        stream = hashlib.shake_256(self.key + self._message("words", *purpose)).digest(8 * count)
        return np.frombuffer(stream, dtype="<u8")

    def normal(self, count: int, *purpose: object) -> np.ndarray:
        """`count` standard normal values in fp64 by inversion, each the scaled sum of four."""
        uniform = (
            (self.words(_SUMMED * count, "normal", *purpose) >> (64 - _UNIFORM_BITS)) + 0.5
        ) * 2.0**-_UNIFORM_BITS
        values: np.ndarray = ndtri(uniform).reshape(_SUMMED, count).sum(axis=0) / _SUMMED**0.5
        return values

    def commitment(self, data: bytes, *purpose: object) -> str:
        """A keyed digest that tells whether data are the same as before, and nothing else about them."""
        return hmac.new(
            self.key, self._message("commitment", *purpose) + data, hashlib.sha256
        ).hexdigest()

    def _message(self, *purpose: object) -> bytes:
        if len(self.key) != _KEY_BYTES:
            raise ArtifactRefused(
                f"the key of run {self.run} has been destroyed, so it cannot go on",
                "start anew with --resume never",
            )
        return json.dumps([str(part) for part in purpose]).encode()


def open_source(path: Path, noise_source: str, seed: int) -> RandomSource:
    """The source of an unfinished run, or a new one.

    Args:
        path: where the run keeps its key, readable by its owner alone.
        noise_source: `system`, or `seeded`: the key then follows from the seed, and everyone can know it.
        seed: for `seeded`.

    Raises:
        ArtifactRefused: the key file is not one.
        InputError: it cannot be written.
        EnvironmentFault: the disk is full.
    """
    if path.exists():
        try:
            fields = json.loads(path.read_text())
            return RandomSource(str(fields["run"]), bytes.fromhex(fields["key"]))
        except (ValueError, KeyError, TypeError):
            raise ArtifactRefused(
                f"{path} is not a run's key", "start anew with --resume never"
            ) from None
    key = (
        secrets.token_bytes(_KEY_BYTES)
        if noise_source == "system"
        else hashlib.sha256(f"seeded {seed}".encode()).digest()
    )
    source = RandomSource(secrets.token_hex(8), key)
    _write(path, source)
    return source


def destroy_key(path: Path, source: RandomSource) -> None:
    """Overwrite a run's key and keep its name; storage that copies on write may still hold the key."""
    with path.open("r+b") as old:
        _write(
            path, RandomSource(source.run, b"")
        )  # first, so that a kill in between leaves a file that can be read
        old.write(b"\0" * os.fstat(old.fileno()).st_size)
        old.flush()
        os.fsync(old.fileno())


def _write(path: Path, source: RandomSource) -> None:
    def fill(partial: Path) -> None:
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            json.dump({"run": source.run, "key": source.key.hex()}, file)

    write_file(path, fill)
