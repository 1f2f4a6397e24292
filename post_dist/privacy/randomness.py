"""Randomness that nobody can predict.

A killed run can repeat it for the same gradient, and for that one alone.

A 256-bit key comes from the operating system's entropy. All random words are SHAKE-256 of the key
and of what they are for, so they are functions of the key. A run that resumes after a kill draws
the same batch, and for the same clipped sum the same noise. The noise is a function of the sum
itself: another sum, whatever caused it, gets independent noise.

The key stays in the owner's folder while the run lasts. It is destroyed when the last step is
saved, because whoever has the key and the prompt could subtract the noise. The name of the run
stays.
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

# Bits of a uniform value. Values lie half a step inside (0, 1), so their inverse normal is
# finite.
_UNIFORM_BITS = 52

# A sum of four draws defeats attacks on the lowest bits of one draw (arXiv 2107.10138).
_SUMMED = 4


@dataclass(frozen=True)
class RandomSource:
    """Random words from a secret key.

    Attributes:
        run: public name of the run that the key belongs to.
        key: the secret, which `repr` does not show. Empty after it was destroyed.
    """

    run: str
    key: bytes

    def __repr__(self) -> str:
        return f"RandomSource({self.run})"

    def words(self, count: int, *purpose: object) -> np.ndarray:
        """Return `count` uniform 64-bit words for a purpose.

        The same key and purpose give the same words.
        """
        # SHAKE-256 is an extendable-output function: one digest gives as many words as are needed.
        stream = hashlib.shake_256(self.key + self._message("words", *purpose)).digest(8 * count)
        return np.frombuffer(stream, dtype="<u8")

    def normal(self, count: int, *purpose: object) -> np.ndarray:
        """Return `count` standard normal values in fp64.

        Each is the scaled sum of four values by inversion.
        """
        words = self.words(_SUMMED * count, "normal", *purpose)
        # The upper 52 bits of a word, half a step off the grid.
        uniform = ((words >> (64 - _UNIFORM_BITS)) + 0.5) * 2.0**-_UNIFORM_BITS
        values: np.ndarray = ndtri(uniform).reshape(_SUMMED, count).sum(axis=0) / _SUMMED**0.5
        return values

    def commitment(self, data: bytes, *purpose: object) -> str:
        """Return a keyed digest, which tells whether data are the same as before, and no more."""
        # Keyed, so that nobody without the key can test a guess of the data.
        message = self._message("commitment", *purpose)
        return hmac.new(self.key, message + data, hashlib.sha256).hexdigest()

    def _message(self, *purpose: object) -> bytes:
        """Encode what random words are for.

        Raises:
            ArtifactRefused: the key has been destroyed.
        """
        if len(self.key) != _KEY_BYTES:
            raise ArtifactRefused(
                f"the key of run {self.run} has been destroyed, so it cannot resume",
                "start anew with --resume never",
            )
        return json.dumps([str(part) for part in purpose]).encode()


def open_source(path: Path, noise_source: str, seed: int) -> RandomSource:
    """Open the random source of an unfinished run, or make a new one.

    Args:
        path: file in which the run keeps its key, readable by its owner alone.
        noise_source: `system`; or `seeded`, whose key follows from the seed, so that everyone can
            know it.
        seed: used by `seeded` alone.

    Raises:
        ArtifactRefused: the file does not hold a key.
        InputError: the file cannot be written.
        EnvironmentFault: the disk is full.
    """
    if path.exists():
        return _read(path)
    # A seed gives a key that everyone can compute, for tests alone.
    if noise_source == "system":
        key = secrets.token_bytes(_KEY_BYTES)
    else:
        key = hashlib.sha256(f"seeded {seed}".encode()).digest()
    # The name is random too: two runs of one run file are two runs in the ledger.
    source = RandomSource(secrets.token_hex(8), key)
    _write(path, source)
    return source


def destroy_key(path: Path, source: RandomSource) -> None:
    """Overwrite a run's key and keep its name.

    Storage that copies on write may still hold the key.
    """
    with path.open("r+b") as old:
        # Write the new file first, so that a kill before the overwriting leaves a readable file.
        _write(path, RandomSource(source.run, b""))
        size = os.fstat(old.fileno()).st_size
        old.write(b"\0" * size)
        old.flush()
        os.fsync(old.fileno())


def _read(path: Path) -> RandomSource:
    """Read a key file."""
    try:
        fields = json.loads(path.read_text())
        return RandomSource(str(fields["run"]), bytes.fromhex(fields["key"]))
    except (ValueError, KeyError, TypeError):
        raise ArtifactRefused(
            f"{path} does not hold the key of a run", "start anew with --resume never"
        ) from None


def _write(path: Path, source: RandomSource) -> None:
    """Write a key file that its owner alone can read."""

    def fill(partial: Path) -> None:
        # Created with its final mode, so that nobody else can open it in between.
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        descriptor = os.open(partial, flags, 0o600)
        with os.fdopen(descriptor, "w") as file:
            json.dump({"run": source.run, "key": source.key.hex()}, file)

    write_file(path, fill)
