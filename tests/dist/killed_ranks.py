"""Break a distillation on two ranks at a chosen place, resume it, and compare with an unbroken run.

    DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 PYTHONPATH=tests \
        python tests/dist/killed_ranks.py FOLDER [--times N] [--table FILE]

Each rank is a process of its own over gloo, without a launcher that would clean up after it. A rank
is killed from within, at a random step. The other rank must end by itself.
"""

import argparse
import json
import math
import os
import random
import re
import signal
import socket
import statistics
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

from post_dist.runtime import engine_checkpoint
from post_dist.stages.distill import stage as distill_stage
from post_dist.stages.distill.model import DistillationModel

STEPS = 9
EVERY = 2
"""Steps from one checkpoint to the next."""

Prepare = Callable[[], None]
"""Runs in a rank before its command line."""
Expected = tuple[bytes, float]
"""The student's file and the last loss of a run that nothing broke."""


def undisturbed() -> None:
    pass


def in_half_a_shard(number: int) -> None:
    """Die when half of a rank's file of a checkpoint is written."""
    real = engine_checkpoint.save_file
    calls = 0

    def save_file(tensors: dict, path: Path) -> None:
        nonlocal calls
        real(tensors, path)
        calls += 1
        if calls == number:
            os.truncate(path, path.stat().st_size // 2)
            die()

    engine_checkpoint.save_file = save_file


def behind_a_slow_write(number: int) -> None:
    """Die in a later step, while a rank's file of a checkpoint is being written."""
    real = engine_checkpoint.save_file

    def save_file(tensors: dict, path: Path) -> None:
        time.sleep(0.5)
        real(tensors, path)

    engine_checkpoint.save_file = save_file
    at_call(DistillationModel, "forward", number, before=True)


def in_a_gather(number: int) -> None:
    """Die in a gather of the teacher's weights, after training has begun."""
    real = distill_stage.run_training

    def run_training(*given: Any, **named: Any) -> None:
        at_call(PartitionedParameterCoordinator, "fetch_sub_module", number, before=True)
        real(*given, **named)

    distill_stage.run_training = run_training


def random_step() -> int:
    return random.randrange(1, STEPS + 1)


def random_save() -> int:
    return random.randrange(1, (STEPS - 1) // EVERY + 1)


def before_call(owner: Any, name: str, number: Callable[[], int]) -> Prepare:
    return lambda: at_call(owner, name, number(), before=True)


def after_call(owner: Any, name: str, number: Callable[[], int]) -> Prepare:
    return lambda: at_call(owner, name, number(), before=False)


KILLS: dict[str, Prepare] = {
    "SIGKILL in the student's forward": before_call(DistillationModel, "forward", random_step),
    "SIGKILL in a gather of the teacher": lambda: in_a_gather(10 * random_step()),
    "SIGKILL after the backward pass": after_call(
        deepspeed.DeepSpeedEngine, "backward", random_step
    ),
    "SIGKILL in the optimizer": after_call(torch.optim.AdamW, "step", random_step),
    "SIGKILL while a shard is written": lambda: in_half_a_shard(random_save()),
    "SIGKILL behind a slow write": lambda: behind_a_slow_write(random_step()),
    "SIGKILL before the rename": before_call(engine_checkpoint, "put_in_place", random_save),
    "SIGKILL after the rename": after_call(engine_checkpoint, "put_in_place", random_save),
}
ANOTHER = " *"
"""Marks table rows whose student need not be bit-equal."""
BY_RANK_0 = ("SIGKILL before the rename", "SIGKILL after the rename")


@dataclass
class Run:
    """The ranks of one start."""

    output: Path
    ranks: list[int]

    def folder(self) -> Path:
        (folder,) = self.output.glob("tiny/distill-????????")
        return folder

    def log(self) -> str:
        return (self.output / "said.txt").read_text()

    def wait(self) -> tuple[list[int], float]:
        """Return the exit codes (negative for a signal), and seconds from first end to last."""
        codes: dict[int, int] = {}
        ends = []
        while len(codes) < len(self.ranks):
            for rank in self.ranks:
                if rank in codes:
                    continue
                process, status = os.waitpid(rank, os.WNOHANG)
                if process:
                    codes[rank] = os.waitstatus_to_exitcode(status)
                    ends.append(time.monotonic())
            time.sleep(0.01)
        return [codes[rank] for rank in self.ranks], ends[-1] - ends[0]

    def metrics(self) -> list[dict]:
        path = self.folder() / "metrics.jsonl"
        if not path.exists():
            return []
        return [json.loads(line) for line in path.read_text().splitlines()]

    def steps_written(self) -> list[int]:
        return [line["step"] for line in self.metrics()]

    def wait_for_more_than(self, written: int) -> None:
        self._wait_until(lambda: len(self.steps_written()) != written)

    def wait_for(self, step: int) -> None:
        def is_written() -> bool:
            begun = list(self.output.glob("tiny/distill-*/metrics.jsonl"))
            return bool(begun) and step in self.steps_written()

        self._wait_until(is_written)

    def _wait_until(self, reached: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not reached():
            assert time.monotonic() < deadline, self.log()[-3000:]
            time.sleep(0.005)


def start(
    base: Path,
    output: Path,
    size: int = 2,
    prepare: dict[int, Prepare] | None = None,
    *settings: str,
) -> Run:
    output.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    arguments = ["distill", str(base / "run.yaml"), f"--output={output}"]
    for setting in (
        f"distill.steps={STEPS}",
        f"distill.checkpoint_every_steps={EVERY}",
        *settings,
    ):
        arguments.append(f"--set={setting}")
    ranks = []
    for rank in range(size):
        environment = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        preparation = (prepare or {}).get(rank, undisturbed)
        ranks.append(fork_command(arguments, environment, output / "said.txt", preparation))
    return Run(output, ranks)


def result(run: Run) -> Expected:
    """Return the student's weights, and the loss of the last step."""
    last = run.metrics()[-1]
    loss = 5 * last["ce"] + 2 * last["lm"] + last["cos"]
    return (run.folder() / "artifact" / "model.safetensors").read_bytes(), loss


@dataclass
class Outcome:
    """What one broken run cost.

    Attributes:
        detected: seconds from the end of the broken rank to that of the other.
        resumed: seconds from the start of the second command to its first step.
        lost: steps that were taken twice.
        out_of_place: steps that are missing or doubled among those that made the student.
        equal: whether the student is bit-equal.
        difference: relative difference of the last loss.
    """

    detected: float = 0.0
    resumed: float = 0.0
    lost: int = 0
    out_of_place: int = 0
    equal: bool = False
    difference: float = 0.0


def relative_difference(loss: float, expected: float) -> float:
    return abs(loss - expected) / expected


def resume(base: Path, broken: Run, detected: float, expected: Expected, *settings: str) -> Outcome:
    """Start the command again, and compare the result."""
    done = broken.steps_written()
    began = time.monotonic()
    again = start(base, broken.output, 2, None, *settings)
    again.wait_for_more_than(len(done))
    resumed = time.monotonic() - began
    codes, _ = again.wait()
    assert codes == [0, 0], again.log()[-3000:]

    written = again.steps_written()
    first_again = written[len(done)]
    lost = max(done) + 1 - first_again if done else 0
    made_the_student = [step for step in done if step < first_again] + written[len(done) :]
    missing = set(range(STEPS)) ^ set(made_the_student)
    doubled = len(made_the_student) - len(set(made_the_student))
    weights, loss = result(again)
    return Outcome(
        detected,
        resumed,
        max(0, lost),
        len(missing) + doubled,
        weights == expected[0],
        relative_difference(loss, expected[1]),
    )


def killed(
    base: Path, output: Path, expected: Expected, kill: Prepare, rank: int, *settings: str
) -> Outcome:
    run = start(base, output, 2, {rank: kill}, *settings)
    codes, detected = run.wait()
    assert codes[rank] == -signal.SIGKILL, f"rank {rank} was not killed: {codes}"
    assert codes[1 - rank] == 3, f"the other rank: {codes}, {run.log()[-3000:]}"
    return resume(base, run, detected, expected, *settings)


SERVED_BY_TWOS = (
    "distill.micro_batch_size_per_gpu=1",
    "distill.teacher_micro_batch_size_per_gpu=2",
)


def within_a_pass_of_the_teacher(base: Path, output: Path, expected: Expected) -> Outcome:
    """Die before the second micro-batch that one pass of the teacher serves."""
    # Micro-batches of another size round sums differently, so these settings have their own result.
    alone = start(base, output / "alone", 2, None, *SERVED_BY_TWOS)
    assert alone.wait()[0] == [0, 0], alone.log()[-3000:]
    kill = before_call(DistillationModel, "forward", lambda: 2 * random_step())
    rank = random.randrange(2)
    return killed(base, output / "killed", result(alone), kill, rank, *SERVED_BY_TWOS)


def checkpoint_step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def asked_to_stop(base: Path, output: Path, expected: Expected, by: signal.Signals) -> Outcome:
    run = start(base, output)
    run.wait_for(2)
    os.kill(run.ranks[random.randrange(2)], by)
    codes, detected = run.wait()
    assert codes == [6, 6], codes
    newest = max(checkpoint_step(path) for path in run.folder().glob("checkpoints/step-*"))
    assert f"is saved at step {newest} of {STEPS}" in run.log()
    return resume(base, run, detected, expected)


def stopped_for_30_seconds(base: Path, output: Path, expected: Expected) -> Outcome:
    """Stop a rank longer than the other rank's watchdog allows, and wake it again.

    The watchdog, set to 15 s, ends the other rank. The stopped rank wakes up alone and ends too.
    """
    run = start(base, output, 2, None, "engine.hang_timeout_seconds=15")
    run.wait_for(3)
    os.kill(run.ranks[1], signal.SIGSTOP)
    stopped = time.monotonic()
    code = os.waitstatus_to_exitcode(os.waitpid(run.ranks[0], 0)[1])
    detected = time.monotonic() - stopped
    said = run.log()
    assert re.search(r"rank 0 has made no progress for 15 s in: (distill|writing)\b", said), said[
        -3000:
    ]
    assert "most recent call first" in said, "the stacks are printed"
    time.sleep(max(0.0, 30 - detected))
    os.kill(run.ranks[1], signal.SIGCONT)
    other_code = os.waitstatus_to_exitcode(os.waitpid(run.ranks[1], 0)[1])
    assert (code, other_code) == (3, 3)
    return resume(base, run, detected, expected)


@contextmanager
def small_disk(place: Path, kibibytes: int) -> Iterator[None]:
    """Mount a small file system at `place`, which can get full; needs root."""
    place.mkdir(parents=True)
    size = f"size={kibibytes}k"
    subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(place)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(place)], check=True)


def on_a_full_disk(base: Path, output: Path, expected: Expected) -> Outcome:
    with small_disk(output, 640):
        run = start(base, output)
        codes, detected = run.wait()
        said = run.log()
        assert codes == [3, 3], said[-3000:]
        assert "the disk is full" in said
        subprocess.run(["mount", "-o", "remount,size=100m", str(output)], check=True)
        return resume(base, run, detected, expected)


def killed_after_a_checkpoint(base: Path, output: Path, *settings: str) -> tuple[Run, float, Path]:
    """Return a killed run, the seconds until the other rank ended, and the newest checkpoint."""
    run = start(base, output, 2, {0: KILLS["SIGKILL after the rename"]}, *settings)
    _, detected = run.wait()
    newest = max(run.folder().glob("checkpoints/step-*"), key=checkpoint_step)
    return run, detected, newest


def with_a_damaged_file(
    base: Path, output: Path, expected: Expected, file: str, damage: Callable[[Path], None]
) -> Outcome:
    run, detected, newest = killed_after_a_checkpoint(base, output)
    damage(newest / file)
    outcome = resume(base, run, detected, expected)
    assert f"{newest.name} is damaged" in run.log()
    return outcome


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


FILES = ("rank0.safetensors", "rank1.safetensors", "checkpoint.json")
DAMAGES = {"truncated": truncate, "flipped": flip, "deleted": Path.unlink}


def with_a_damaged_start(
    base: Path, output: Path, expected: Expected, damage: Callable[[Path], None]
) -> Outcome:
    """Damage the untrained student, which is made again from the teacher."""
    run, detected, _ = killed_after_a_checkpoint(base, output)
    damage(run.folder() / "checkpoints" / "untrained" / "model.safetensors")
    outcome = resume(base, run, detected, expected)
    assert "untrained is damaged: it is made again from the teacher" in run.log()
    return outcome


def with_damaged_tokens(
    base: Path, output: Path, expected: Expected, damage: Callable[[Path], None]
) -> Outcome:
    """Damage the tokens of the corpus: refused by name until the file is deleted as told."""
    run, detected, _ = killed_after_a_checkpoint(base, output)
    (part,) = output.glob("corpora/*/part-*.safetensors")
    damage(part)
    if part.exists():
        codes, _ = start(base, output).wait()
        said = run.log()
        assert codes == [4, 4], said[-3000:]
        assert f"{part.name} is not as it was written" in said
        part.unlink()
    return resume(base, run, detected, expected)


def with_copies_on_the_node(base: Path, output: Path, expected: Expected) -> Outcome:
    """Flip a bit of each rank's newest file, whose copies on the node are read instead."""
    copies = f"engine.local_checkpoint_folder={output}/node"
    run, detected, newest = killed_after_a_checkpoint(base, output, copies)
    digests = json.loads((newest / "checkpoint.json").read_text())
    for name in digests:
        flip(newest / name)
    kept = list(output.glob("node/tiny/distill-*/*.safetensors"))
    assert {path.stem.partition("-")[2] for path in kept} >= set(digests.values())
    outcome = resume(base, run, detected, expected, copies)
    assert f"resuming from step {checkpoint_step(newest)}" in run.log()
    assert not list(output.glob("node/tiny/distill-*/*")), "copies of a finished run"
    return outcome


def with_damaged_copies(base: Path, output: Path, expected: Expected) -> Outcome:
    """Flip a bit of each copy on the node. The files of the checkpoint are read."""
    copies = f"engine.local_checkpoint_folder={output}/node"
    run, detected, newest = killed_after_a_checkpoint(base, output, copies)
    for path in output.glob("node/tiny/distill-*/*.safetensors"):
        flip(path)
    outcome = resume(base, run, detected, expected, copies)
    said = run.log()
    assert "is damaged: the original is read" in said
    assert f"resuming from step {checkpoint_step(newest)}" in said
    return outcome


def other_world_sizes(base: Path, output: Path, expected: Expected) -> Outcome:
    """Run on two ranks, then on one, then on two; each is stopped by SIGTERM."""
    run = start(base, output)
    took = 0.0
    for step, size in ((2, 1), (4, 2)):
        run.wait_for(step)
        os.kill(run.ranks[0], signal.SIGTERM)
        codes, took = run.wait()
        assert codes == [6] * len(run.ranks), codes
        if size == 1:
            run = start(base, output, size)
    return resume(base, run, took, expected)


def spoil(first: int, last: int) -> Prepare:
    """Make the loss of some forward passes NaN."""

    def prepare() -> None:
        real = DistillationModel.forward
        calls = 0

        def forward(model: DistillationModel, *given: torch.Tensor) -> tuple:
            nonlocal calls
            calls += 1
            loss, terms, hidden = real(model, *given)
            if first <= calls <= last:
                loss = loss * float("nan")
            return loss, terms, hidden

        DistillationModel.forward = forward

    return prepare


def spoiled_once(base: Path, output: Path, expected: Expected, zero_stage: int) -> Outcome:
    """Spoil one loss: both ranks skip the micro-batch, count it, and finish another student."""
    run = start(base, output, 2, {1: spoil(3, 3)}, f"engine.zero_stage={zero_stage}")
    codes, _ = run.wait()
    said = run.log()
    assert codes == [0, 0], said[-3000:]
    assert "distill step 2: the loss is not finite on rank 1: a micro-batch is skipped" in said
    lines = run.metrics()
    assert [line["skipped"] for line in lines] == [0, 0] + [1] * (STEPS - 2)
    assert all(math.isfinite(line[term]) for line in lines for term in ("ce", "lm", "cos"))
    weights, loss = result(run)
    return Outcome(equal=weights == expected[0], difference=relative_difference(loss, expected[1]))


def spoiled_for_good(base: Path, output: Path, expected: Expected) -> Outcome:
    run = start(base, output, 2, {1: spoil(4, 1000)})
    codes, detected = run.wait()
    said = run.log()
    assert codes == [2, 2], said[-3000:]
    wanted = "5 micro-batches in a row were not finite, up to step 7 (on rank 1)"
    assert f"distill: {wanted}" in said
    assert not list(output.glob("tiny/distill-*/artifact"))
    return resume(base, run, detected, expected)


Broken = Callable[[Path, Path, Expected], Outcome]
"""Breaks a run in one way: takes the folder of the run file, an output folder and the result."""


def with_kill(name: str) -> Broken:
    def broken(base: Path, output: Path, expected: Expected) -> Outcome:
        rank = 0 if name in BY_RANK_0 else random.randrange(2)
        return killed(base, output, expected, KILLS[name], rank)

    return broken


def with_arguments(function: Callable[..., Outcome], *arguments: Any) -> Broken:
    return lambda base, output, expected: function(base, output, expected, *arguments)


def rows(times: int) -> Iterator[tuple[str, int, Broken]]:
    """Yield the rows of the table: a name, how often it is run, and what breaks the run."""
    for name in KILLS:
        yield name, times, with_kill(name)
    yield "SIGKILL within a pass of the teacher", times, within_a_pass_of_the_teacher
    for by in (signal.SIGTERM, signal.SIGUSR2):
        yield by.name, 1, with_arguments(asked_to_stop, by)
    yield "SIGSTOP for 30 s, watchdog at 15 s", 1, stopped_for_30_seconds
    if os.geteuid() == 0:
        yield "disk full at a checkpoint, then room made", 1, on_a_full_disk
    for file in FILES:
        for kind, damage in DAMAGES.items():
            name = f"newest checkpoint's {file} {kind}"
            yield name, 1, with_arguments(with_a_damaged_file, file, damage)
    for kind, damage in DAMAGES.items():
        yield f"untrained student {kind}", 1, with_arguments(with_a_damaged_start, damage)
    for kind, damage in DAMAGES.items():
        yield f"tokens of the corpus {kind}", 1, with_arguments(with_damaged_tokens, damage)
    yield "newest checkpoint flipped, copies on the node", 1, with_copies_on_the_node
    yield "copies on the node flipped", 1, with_damaged_copies
    for zero_stage in (1, 3):
        name = f"loss not finite once, ZeRO-{zero_stage}{ANOTHER}"
        yield name, 1, with_arguments(spoiled_once, zero_stage)
    yield f"loss not finite from step 3 on{ANOTHER}", 1, spoiled_for_good
    yield f"2 ranks, then 1, then 2{ANOTHER}", 1, other_world_sizes


HEAD = (
    "| fault | runs | detected after s, median (worst) | resumed after s, median (worst) "
    "| steps lost, most | samples lost or doubled | weights bit-equal | last loss off by, worst |"
)
ABOUT = f"""\
- Made by: `make faults`.
- Machine: torch {torch.__version__}, deepspeed {deepspeed.__version__}, two cores.
- Run: a tiny Llama is distilled on two ranks over gloo without a launcher: teacher ZeRO-3, student
  ZeRO-1, fp32, {STEPS} steps, a checkpoint every {EVERY}. Each kill is at a random step and rank.
- Columns: `detected` is the time from the end of the broken rank to that of the other. `resumed` is
  the time from the start of the command to its first step. Libraries are loaded already, which
  takes a fresh start about 8 s.
- Caveat: rows with a star make another student. Another number of ranks rounds sums differently,
  and a loss that is not finite is skipped.
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--times", type=int, default=1)
    parser.add_argument("--rows", nargs="*", help="names of the rows to run; all without it")
    parser.add_argument("--table", type=Path)
    options = parser.parse_args()
    tiny.write_run(options.folder)
    alone = start(options.folder, options.folder / "alone")
    assert alone.wait()[0] == [0, 0], alone.log()[-3000:]
    expected = result(alone)

    right = []
    lines = []
    wrong = {}
    for name, times, broken in rows(options.times):
        if options.rows and name not in options.rows:
            continue
        slug = re.sub("[^A-Za-z0-9]+", "-", name)
        try:
            outcomes = []
            for number in range(times):
                place = options.folder / f"{slug}-{number}"
                outcomes.append(broken(options.folder, place, expected))
            lines.append(table_row(name, outcomes))
            right.append(name.strip())
            print(lines[-1], flush=True)
        except AssertionError as error:
            wrong[name] = str(error)
    if options.table:
        table = "\n".join([HEAD, "|" + "---|" * 8, *lines])
        options.table.write_text(f"# Distillation under faults (CPU)\n\n{ABOUT}\n{table}\n")
    print(json.dumps({"right": right, "wrong": wrong}))
    sys.exit(bool(wrong))


def table_row(name: str, outcomes: list[Outcome]) -> str:
    """Return a row of the table.

    Raises:
        AssertionError: a run lost steps, or its student differs more than it may.
    """
    out_of_place = sum(outcome.out_of_place for outcome in outcomes)
    assert out_of_place == 0, f"{out_of_place} steps are missing or doubled"
    equal = sum(outcome.equal for outcome in outcomes)
    may_differ = name.endswith(ANOTHER)
    assert may_differ or equal == len(outcomes), f"{len(outcomes) - equal} students differ"
    difference = max(outcome.difference for outcome in outcomes)
    largest = 1e-2 if "not finite" in name else 1e-6
    assert difference < largest, f"the last loss is off by {difference:.1e}"
    cells = [
        name,
        str(len(outcomes)),
        seconds([outcome.detected for outcome in outcomes]),
        seconds([outcome.resumed for outcome in outcomes]),
        str(max(outcome.lost for outcome in outcomes)),
        str(out_of_place),
        str(equal),
        f"{difference:.1e}",
    ]
    return f"| {' | '.join(cells)} |"


def seconds(values: list[float]) -> str:
    return f"{statistics.median_high(values):.1f} ({max(values):.1f})"


if __name__ == "__main__":
    main()
