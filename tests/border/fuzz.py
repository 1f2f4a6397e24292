"""Send random artifacts through the door: each is admitted or refused, and nothing else happens.

    python tests/border/fuzz.py --prompts 100000 --students 2000 --swaps 10000

An artifact is an honest one with one to three changes: bytes of a file, values of a JSON file, the
header of the weights, its files. Its manifest agrees with it. The script prints how many different
ones it made. It fails at the first one that raises an error of another kind, needs over five
seconds of the processor or 500 MiB of memory, or is admitted though no honest one is like it. Then
it admits a prompt whose files another process replaces all the time.
"""

import argparse
import hashlib
import os
import random
import resource
import shutil
import stat
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import tiny
import torch
from border import prompt_changes, student_changes
from border.hostile import sign

from post_dist.admission.door import admit_prompt
from post_dist.errors import ArtifactRefused

_MOST_SECONDS = 5.0
_MOST_MIB = 500.0
_PROGRESS = 10_000

Change = Callable[[Path, random.Random], None]


@dataclass(frozen=True)
class Target:
    """What is sent through the door.

    Attributes:
        honest: honest artifacts to change.
        changes: the changes, of which one to three are made.
        admit: admits a folder, and checks what came in.
    """

    honest: Sequence[Path]
    changes: Sequence[Change]
    admit: Callable[[Path], None]


@dataclass
class Result:
    """What became of the artifacts.

    Attributes:
        different: how many different ones were made.
        outcomes: how many were admitted and refused.
        seconds: the most seconds of the processor that one needed, its child included.
        mib: the most memory that one needed in this process.
    """

    different: int = 0
    outcomes: Counter = field(default_factory=Counter)
    seconds: float = 0.0
    mib: float = 0.0

    def __str__(self) -> str:
        return (
            f"{self.different} different, {dict(self.outcomes)}, at most {self.seconds:.2f} s of "
            f"the processor and {self.mib:.1f} MiB each"
        )


def prompts(folder: Path) -> Target:
    """Return the prompts to send. A quarter each has a privacy statement, a LoRA, and a prefix.

    The accountant would take most of the time if all of them had a statement.
    """
    lora = prompt_changes.write_lora(folder.with_name(f"{folder.name}-lora"))
    prefix = prompt_changes.write_prefix(folder.with_name(f"{folder.name}-prefix"))
    honest = [prompt_changes.HONEST, lora, prefix, without_statement(folder)]
    return Target(honest, prompt_changes.CHANGES, prompt_changes.admit)


def without_statement(folder: Path) -> Path:
    """Write the honest prompt without a privacy statement."""
    shutil.copytree(prompt_changes.HONEST, folder)
    (folder / "privacy.json").unlink()
    sign(folder)
    return folder


def students(folder: Path, families: Sequence[str] = student_changes.FAMILIES) -> Target:
    """Write honest students of some families, and return the students to send."""
    honest = [tiny.write_student(folder / family, family) for family in families]
    return Target(honest, student_changes.CHANGES, student_changes.admit)


def fuzz(target: Target, count: int, seed: int, place: Path) -> Result:
    """Make different artifacts and send them through the door."""
    chance = random.Random(seed)
    seen: set[str] = set()
    result = Result()
    folder = place / "sent"
    for honest in target.honest:
        target.admit(shutil.copytree(honest, folder))  # imports what the first one needs
        shutil.rmtree(folder)
    while len(seen) < count:
        digest = _make(folder, target, chance)
        if digest not in seen:
            seen.add(digest)
            _send(folder, target, result)
            result.different = len(seen)
            if len(seen) % _PROGRESS == 0:
                print(result, flush=True)
        shutil.rmtree(folder)
    return result


def _make(folder: Path, target: Target, chance: random.Random) -> str:
    """Make a hostile artifact, and return a digest of all its files."""
    shutil.copytree(chance.choice(target.honest), folder)
    for _ in range(chance.randrange(1, 4)):
        # A second change may find that the first has damaged its file.
        with suppress(ValueError, TypeError, KeyError, AttributeError, OSError, struct.error):
            chance.choice(target.changes)(folder, chance)
    # The manifest itself may have become unreadable.
    with suppress(ValueError, TypeError):
        sign(folder)
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        status = path.lstat()
        digest.update(f"{path.name!r} {status.st_mode} {status.st_size}".encode())
        if stat.S_ISREG(status.st_mode) and status.st_size < 1 << 24:
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _send(folder: Path, target: Target, result: Result) -> None:
    """Send an artifact through the door, and measure what it needs."""
    before = _processor_seconds()
    resident = _start_of_memory()
    try:
        target.admit(folder)
        result.outcomes["admitted"] += 1
        said = ""
    except ArtifactRefused as error:
        result.outcomes["refused"] += 1
        said = str(error)
    seconds = _processor_seconds() - before
    mib = _memory_mib("VmHWM") - resident
    assert all(line.isprintable() for line in said.splitlines()), repr(said)
    assert seconds < _MOST_SECONDS, f"{seconds:.1f} s: {said}"
    assert mib < _MOST_MIB, f"{mib:.0f} MiB: {said}"
    result.seconds = max(result.seconds, seconds)
    result.mib = max(result.mib, mib)


def _processor_seconds() -> float:
    """Return the time of this process and of the tokenizers' trials. Other processes add none."""
    total = 0.0
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        usage = resource.getrusage(who)
        total += usage.ru_utime + usage.ru_stime
    return total


def _start_of_memory() -> float:
    """Let the largest memory of this process be that of now, and return it in MiB."""
    Path("/proc/self/clear_refs").write_text("5")
    return _memory_mib("VmHWM")


def _memory_mib(name: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 1024
    raise AssertionError(name)


_SWAPPER = """
import itertools, os, sys
folder, others, ready = sys.argv[1:]
kept = {name: open(f"{folder}/{name}", "rb").read() for name in os.listdir(others)}
swapped = {name: open(f"{others}/{name}", "rb").read() for name in kept}
for count in itertools.count(1):
    for content in (swapped, kept):
        for name in kept:
            with open(f"{others}.next", "wb") as file:
                file.write(content[name])
            os.rename(f"{others}.next", f"{folder}/{name}")
    with open(f"{ready}.next", "w") as file:
        file.write(str(2 * count * len(kept)))
    os.rename(f"{ready}.next", ready)
"""
"""Replaces files of a folder by others, and puts them back, until it is ended."""


def swap(attempts: int, place: Path) -> tuple[Counter, int]:
    """Admit a prompt while another process replaces its task and its weights all the time.

    Returns:
        How often it was admitted and refused, and how many files were replaced meanwhile. Admitted
        is only what the manifest names.
    """
    sent = without_statement(place / "sent")
    wanted = admit_prompt(sent)
    others = place / "others"
    others.mkdir()
    weights = bytearray((sent / prompt_changes.WEIGHTS).read_bytes())
    weights[-1] ^= 1
    (others / prompt_changes.WEIGHTS).write_bytes(weights)
    (others / "task.json").write_text((sent / "task.json").read_text().replace("Review", "review"))
    count = place / "count"
    command = [sys.executable, "-I", "-c", _SWAPPER, str(sent), str(others), str(count)]
    outcomes: Counter = Counter()
    with subprocess.Popen(command) as swapper:
        try:
            while not count.exists():
                time.sleep(0.01)
            for _ in range(attempts):
                outcomes[_admitted_as(sent, wanted.embeddings, wanted.task)] += 1
            replaced = int(count.read_text())
        finally:
            swapper.kill()
    return outcomes, replaced


def _admitted_as(sent: Path, embeddings: torch.Tensor, task: object) -> str:
    try:
        prompt = admit_prompt(sent)
    except ArtifactRefused:
        return "refused"
    assert torch.equal(prompt.embeddings, embeddings), "other weights came in"
    assert prompt.task == task, "another task came in"
    return "admitted"


def main() -> None:
    """Print how many different artifacts were made, and what became of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=100_000)
    parser.add_argument("--students", type=int, default=2_000)
    parser.add_argument("--swaps", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        outcomes, replaced = swap(options.swaps, place / "swaps")
        print(f"swaps: {dict(outcomes)} while {replaced} files were replaced", flush=True)
        target = students(place / "honest")
        print(f"students: {fuzz(target, options.students, options.seed, place)}", flush=True)
        claims = prompts(place / "honest prompt")
        print(f"prompts: {fuzz(claims, options.prompts, options.seed, place)}", flush=True)


if __name__ == "__main__":
    main()
