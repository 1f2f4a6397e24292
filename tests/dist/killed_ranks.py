"""Break a distillation on two ranks at a chosen place, start it again, and compare with one that was left alone.

    DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 PYTHONPATH=tests python tests/dist/killed_ranks.py FOLDER [--times N] [--table FILE]

Each rank is a process of its own over gloo, without a launcher that would clean up after it. A kill comes from within, at a random
step and rank. The ranks that are left must end by themselves.
"""

import argparse
import json
import os
import math
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import tiny
import torch
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from faults import at_call, die, fork_command

from post_dist.runtime import checkpoint
from post_dist.stages.distill import stage as distill

STEPS, EVERY = 9, 2
Prepare = Callable[[], None]


def left_alone() -> None:
    pass


def in_half_a_shard(number: int) -> None:
    """Die with half of a rank's file of a checkpoint written."""
    real, calls = checkpoint.save_file, [0]

    def save_file(tensors: dict, path: Path) -> None:
        real(tensors, path)
        calls[0] += 1
        if calls[0] == number:
            os.truncate(path, path.stat().st_size // 2)
            die()

    checkpoint.save_file = save_file


def in_a_gather(number: int) -> None:
    """Die in a gather of the teacher's weights, once the steps have begun."""
    real = distill._train

    def train(*given: Any) -> None:
        at_call(PartitionedParameterCoordinator, "fetch_sub_module", number, before=True)
        real(*given)

    distill._train = train


def steps() -> int:
    return random.randrange(1, STEPS + 1)


def saves() -> int:
    return random.randrange(1, (STEPS - 1) // EVERY + 1)


KILLS: dict[str, Callable[[], None]] = {
    "SIGKILL in the student's forward": lambda: at_call(distill.DistillationModel, "forward", steps(), before=True),
    "SIGKILL in a gather of the teacher": lambda: in_a_gather(10 * steps()),
    "SIGKILL after the backward pass": lambda: at_call(deepspeed.DeepSpeedEngine, "backward", steps(), before=False),
    "SIGKILL in the optimizer": lambda: at_call(torch.optim.AdamW, "step", steps(), before=False),
    "SIGKILL while a shard is written": lambda: in_half_a_shard(saves()),
    "SIGKILL before the rename": lambda: at_call(checkpoint, "put_in_place", saves(), before=True),
    "SIGKILL after the rename": lambda: at_call(checkpoint, "put_in_place", saves(), before=False),
}
ANOTHER = " *"
"""Marks rows whose student need not be bit-equal."""
BY_RANK_0 = ("SIGKILL before the rename", "SIGKILL after the rename")


@dataclass
class Run:
    """The ranks of one start."""

    output: Path
    ranks: list[int]

    def folder(self) -> Path:
        (folder,) = self.output.glob("tiny/distill-????????")
        return folder

    def wait(self) -> tuple[list[int], float]:
        """The exit codes (negative for a signal), and the seconds between the first end and the last."""
        codes, ends = {}, []
        while len(codes) < len(self.ranks):
            for rank in self.ranks:
                if rank not in codes and (ended := os.waitpid(rank, os.WNOHANG))[0]:
                    codes[rank] = os.waitstatus_to_exitcode(ended[1])
                    ends.append(time.monotonic())
            time.sleep(0.01)
        return [codes[rank] for rank in self.ranks], ends[-1] - ends[0]

    def steps_written(self) -> list[int]:
        metrics = self.folder() / "metrics.jsonl"
        return [json.loads(line)["step"] for line in metrics.read_text().splitlines()] if metrics.exists() else []

    def wait_for_more_than(self, written: int) -> None:
        deadline = time.monotonic() + 60
        while len(self.steps_written()) == written:
            assert time.monotonic() < deadline, (self.output / "said.txt").read_text()[-3000:]
            time.sleep(0.005)

    def wait_for(self, step: int) -> None:
        deadline = time.monotonic() + 60
        while not (list(self.output.glob("tiny/distill-*/metrics.jsonl")) and step in self.steps_written()):
            assert time.monotonic() < deadline, (self.output / "said.txt").read_text()[-3000:]
            time.sleep(0.005)


def start(base: Path, output: Path, size: int = 2, prepare: dict[int, Prepare] | None = None, *settings: str) -> Run:
    output.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    arguments = ["distill", str(base / "run.yaml"), f"--output={output}", f"--set=distill.steps={STEPS}"]
    arguments += [f"--set={setting}" for setting in (f"distill.checkpoint_every_steps={EVERY}", *settings)]
    ranks = []
    for rank in range(size):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        ranks.append(fork_command(arguments, place, output / "said.txt", (prepare or {}).get(rank, left_alone)))
    return Run(output, ranks)


def result(run: Run) -> tuple[bytes, float]:
    """The student's weights, and the loss of the last step."""
    last = json.loads((run.folder() / "metrics.jsonl").read_text().splitlines()[-1])
    return (run.folder() / "artifact" / "model.safetensors").read_bytes(), 5 * last["ce"] + 2 * last["lm"] + last["cos"]


HEAD = (
    "| fault | runs | detected after s, median (worst) | resumed after s, median (worst) | steps lost, most "
    "| samples lost or doubled | weights bit-equal | last loss off by, worst |"
)


@dataclass
class Outcome:
    """What one broken run cost."""

    detected: float
    resumed: float
    lost: int
    out_of_place: int
    """Steps, and so samples, that are missing or doubled among those that the result is made of."""
    equal: bool
    difference: float


def go_on(base: Path, broken: Run, detected: float, expected: tuple[bytes, float], size: int = 2) -> Outcome:
    """Start again, and compare what comes out."""
    done = broken.steps_written()
    began = time.monotonic()
    again = start(base, broken.output, size)
    again.wait_for_more_than(len(done))
    resumed = time.monotonic() - began
    codes, _ = again.wait()
    said = (broken.output / "said.txt").read_text()
    assert codes == [0] * size, said[-3000:]
    written = again.steps_written()
    restart = written[len(done)]
    of_the_result = [step for step in done if step < restart] + written[len(done) :]
    weights, loss = result(again)
    return Outcome(
        detected,
        resumed,
        max(0, len(done) and max(done) + 1 - restart),
        len(set(range(STEPS)) ^ set(of_the_result)) + len(of_the_result) - len(set(of_the_result)),
        weights == expected[0],
        abs(loss - expected[1]) / expected[1],
    )


def killed(base: Path, output: Path, expected: tuple[bytes, float], kill: Prepare, rank: int) -> Outcome:
    run = start(base, output, 2, {rank: kill})
    codes, detected = run.wait()
    assert codes[rank] == -signal.SIGKILL, f"rank {rank} was not killed: {codes}"
    assert codes[1 - rank] == 3, f"the other rank: {codes}, {(output / 'said.txt').read_text()[-3000:]}"
    return go_on(base, run, detected, expected)


def asked_to_stop(base: Path, output: Path, expected: tuple[bytes, float], by: signal.Signals) -> Outcome:
    run = start(base, output)
    run.wait_for(2)
    os.kill(run.ranks[random.randrange(2)], by)
    codes, detected = run.wait()
    assert codes == [6, 6], codes
    newest = max(int(path.name.removeprefix("step-")) for path in run.folder().glob("checkpoints/step-*"))
    assert f"is saved at step {newest} of {STEPS}" in (output / "said.txt").read_text()
    return go_on(base, run, detected, expected)


def stopped_for_30_seconds(base: Path, output: Path, expected: tuple[bytes, float]) -> Outcome:
    """The watchdog of the other rank, set to 15 s, ends the run; who stood still then wakes up alone and ends too."""
    run = start(base, output, 2, None, "engine.hang_timeout_seconds=15")
    run.wait_for(3)
    os.kill(run.ranks[1], signal.SIGSTOP)
    stopped = time.monotonic()
    code = os.waitstatus_to_exitcode(os.waitpid(run.ranks[0], 0)[1])
    detected = time.monotonic() - stopped
    said = (output / "said.txt").read_text()
    assert re.search(r"rank 0 has made no progress for 15 s in: (distill|writing)\b", said), said[-3000:]
    assert "most recent call first" in said, "the stacks are shown"
    time.sleep(max(0.0, 30 - detected))
    os.kill(run.ranks[1], signal.SIGCONT)
    assert (code, os.waitstatus_to_exitcode(os.waitpid(run.ranks[1], 0)[1])) == (3, 3)
    return go_on(base, run, detected, expected)


@contextmanager
def small_disk(place: Path, kibibytes: int) -> Iterator[None]:
    """A file system of its own at `place`, that can be full; needs root."""
    place.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kibibytes}k", "tmpfs", str(place)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(place)], check=True)


def on_a_full_disk(base: Path, output: Path, expected: tuple[bytes, float]) -> Outcome:
    with small_disk(output, 640):
        run = start(base, output)
        codes, detected = run.wait()
        said = (output / "said.txt").read_text()
        assert codes == [3, 3], said[-3000:]
        assert "the disk is full" in said
        subprocess.run(["mount", "-o", "remount,size=100m", str(output)], check=True)
        return go_on(base, run, detected, expected)


def with_a_damaged_file(base: Path, output: Path, expected: tuple[bytes, float], file: str, damage: Callable[[Path], None]) -> Outcome:
    run = start(base, output, 2, {0: KILLS["SIGKILL after the rename"], 1: left_alone})
    _, detected = run.wait()
    newest = max(run.folder().glob("checkpoints/step-*"), key=lambda path: int(path.name.removeprefix("step-")))
    damage(newest / file)
    outcome = go_on(base, run, detected, expected)
    assert f"{newest.name} is damaged" in (output / "said.txt").read_text()
    return outcome


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


FILES = ("rank0.safetensors", "rank1.safetensors", "checkpoint.json")
DAMAGES = {"truncated": lambda path: os.truncate(path, path.stat().st_size // 2), "flipped": flip, "deleted": Path.unlink}


def other_world_sizes(base: Path, output: Path, expected: tuple[bytes, float]) -> Outcome:
    """Two ranks, then one, then two; each stopped by SIGTERM."""
    run, took = start(base, output), 0.0
    for step, size in ((2, 1), (4, 2)):
        run.wait_for(step)
        os.kill(run.ranks[0], signal.SIGTERM)
        codes, took = run.wait()
        assert codes == [6] * len(run.ranks), codes
        if size == 1:
            run = start(base, output, size)
    return go_on(base, run, took, expected)


def spoil(first: int, last: int) -> Prepare:
    """Make the loss of some calls no number."""

    def prepare() -> None:
        real, calls = distill.DistillationModel.forward, [0]

        def forward(model: distill.DistillationModel, *given: torch.Tensor) -> tuple:
            calls[0] += 1
            loss, terms, hidden = real(model, *given)
            return (loss * float("nan") if first <= calls[0] <= last else loss), terms, hidden

        distill.DistillationModel.forward = forward

    return prepare


def spoiled_once(base: Path, output: Path, expected: tuple[bytes, float], zero_stage: int) -> Outcome:
    """Both ranks pass over the micro-batch together, count it, and end; the student is another one than without the fault."""
    run = start(base, output, 2, {1: spoil(3, 3)}, f"engine.zero_stage={zero_stage}")
    codes, _ = run.wait()
    said = (output / "said.txt").read_text()
    assert codes == [0, 0], said[-3000:]
    assert "distill step 2: the loss is not finite on rank 1: a micro-batch is passed over" in said
    lines = [json.loads(line) for line in (run.folder() / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped"] for line in lines] == [0, 0] + [1] * (STEPS - 2)
    assert all(math.isfinite(line[term]) for line in lines for term in ("ce", "lm", "cos"))
    weights, loss = result(run)
    return Outcome(0, 0, 0, 0, weights == expected[0], abs(loss - expected[1]) / expected[1])


def spoiled_for_good(base: Path, output: Path, expected: tuple[bytes, float]) -> Outcome:
    run = start(base, output, 2, {1: spoil(4, 1000)})
    codes, detected = run.wait()
    said = (output / "said.txt").read_text()
    assert codes == [2, 2], said[-3000:]
    assert "the loss was not finite on rank 1 at step 7, 5 times in a row" in said
    assert not list(output.glob("tiny/distill-*/artifact"))
    return go_on(base, run, detected, expected)


def rows(times: int) -> Iterator[tuple[str, int, Callable[..., Outcome]]]:
    """The name of each row, how often it is run, and what breaks the run."""
    for name, kill in KILLS.items():
        yield name, times, lambda *given, name=name, kill=kill: killed(*given, kill, 0 if name in BY_RANK_0 else random.randrange(2))
    for by in (signal.SIGTERM, signal.SIGUSR2):
        yield by.name, 1, lambda *given, by=by: asked_to_stop(*given, by)
    yield "SIGSTOP for 30 s, watchdog at 15 s", 1, stopped_for_30_seconds
    if os.geteuid() == 0:
        yield "disk full at a checkpoint, then room made", 1, on_a_full_disk
    for file in FILES:
        for kind, damage in DAMAGES.items():
            yield f"newest checkpoint's {file} {kind}", 1, lambda *given, file=file, damage=damage: with_a_damaged_file(*given, file, damage)
    for zero_stage in (1, 3):
        yield f"loss not finite once, ZeRO-{zero_stage}{ANOTHER}", 1, lambda *given, stage=zero_stage: spoiled_once(*given, stage)
    yield f"loss not finite from step 3 on{ANOTHER}", 1, spoiled_for_good
    yield f"2 ranks, then 1, then 2{ANOTHER}", 1, other_world_sizes


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--times", type=int, default=1)
    parser.add_argument("--rows", default="", help="only those whose name holds this")
    parser.add_argument("--table", type=Path)
    options = parser.parse_args()
    tiny.write_run(options.folder)
    alone = start(options.folder, options.folder / "alone")
    assert alone.wait()[0] == [0, 0], (options.folder / "alone" / "said.txt").read_text()[-3000:]
    expected = result(alone)
    lines, wrong = [HEAD, "|" + "---|" * 8], {}
    for name, times, broken in rows(options.times):
        if options.rows not in name:
            continue
        places = [options.folder / f"{re.sub('[^A-Za-z0-9]+', '-', name)}-{time}" for time in range(times)]
        try:
            lines.append(line(name, [broken(options.folder, place, expected) for place in places]))
            print(lines[-1], flush=True)
        except AssertionError as error:
            wrong[name] = str(error)
    if options.table:
        about = (
            "Made by `make faults`. A tiny Llama is distilled on two ranks over gloo without a launcher, teacher ZeRO-3, student ZeRO-1, fp32, "
            f"{STEPS} steps, a checkpoint every {EVERY}; each kill at a random step and rank. `detected` is the time between the end of the "
            "broken rank and that of the other, `resumed` from the start of the command to its first step; libraries are loaded already, which "
            "a start of its own takes about 8 s for. Rows with a star make another student: with another "
            f"number of ranks sums are rounded otherwise, and what is not finite is passed over. torch {torch.__version__}, "
            f"deepspeed {deepspeed.__version__}, two cores.\n"
        )
        options.table.write_text("# Distillation under faults (CPU)\n\n" + about + "\n" + "\n".join(lines) + "\n")
    print(json.dumps({"right": [row.split("|")[1].strip() for row in lines[2:]], "wrong": wrong}))
    sys.exit(bool(wrong))


def line(name: str, outcomes: list[Outcome]) -> str:
    """A row of the table, if the runs may go into it."""
    detected, resumed = (sorted(getattr(outcome, field) for outcome in outcomes) for field in ("detected", "resumed"))
    spans = " | ".join(f"{seconds[len(seconds) // 2]:.1f} ({seconds[-1]:.1f})" for seconds in (detected, resumed))
    lost, out_of_place = max(outcome.lost for outcome in outcomes), sum(outcome.out_of_place for outcome in outcomes)
    equal, difference = sum(outcome.equal for outcome in outcomes), max(outcome.difference for outcome in outcomes)
    assert out_of_place == 0, f"{out_of_place} steps are missing or doubled"
    assert name.endswith(ANOTHER) or equal == len(outcomes), f"{len(outcomes) - equal} students differ"
    assert difference < (1e-2 if "not finite" in name else 1e-6), f"the last loss is off by {difference:.1e}"
    return f"| {name} | {len(outcomes)} | {spans} | {lost} | {out_of_place} | {equal} | {difference:.1e} |"


if __name__ == "__main__":
    main()
