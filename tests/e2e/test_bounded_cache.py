"""A cache of teacher signals with a limit: the same student, and never more on the disk."""

import json
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import started
import tiny
from started import Command, run_ranks, wait_for

from post_dist.stages.distill.signal_format import file_bytes

# 1,200 sequences in 19 files of 64, and up to 2 files in a step.
OPTIONS = (
    "--set=engine.precision=bf16",
    "--set=corpus.sequence_length=8",
    "--set=distill.batch_size=20",
    "--set=distill.steps=60",
    "--set=distill.checkpoint_every_steps=20",
    "--set=distill.micro_batch_size_per_gpu=16",
)
CACHE = "--set=distill.cache=hidden"
SLOTS = 3
# A token takes 32 numbers in bf16.
LIMIT_BYTES = SLOTS * file_bytes(32 * 2, 8)
LIMITED = (*OPTIONS, CACHE, f"--set=distill.cache_gib={LIMIT_BYTES / 2**30}")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bounded")
    run = tiny.write_run(folder)
    tiny.write_csv(folder / "public.csv", tiny.sentences(800, 2))
    return run


@pytest.fixture(scope="module")
def student(run: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Weights of the student that trains beside the teacher, without any cache."""
    output = tmp_path_factory.mktemp("online")
    done = started.run("distill", run, f"--output={output}", *OPTIONS)
    assert done.returncode == 0, done.stderr
    return weights(output)


def weights(output: Path) -> bytes:
    """Return the bytes of the student below an output folder."""
    (file,) = output.glob("tiny/distill-*/artifact/model.safetensors")
    return file.read_bytes()


def files(output: Path) -> set[int]:
    """Return the numbers of the files of signals below an output folder."""
    return {int(file.stem) for file in output.glob("tiny/teacher-signals-*/*/0*.safetensors")}


def first_read(output: Path) -> int:
    """Return how far the student below an output folder says that it has read; -1 at first."""
    found = list(output.glob("tiny/teacher-signals-*/first"))
    return int(found[0].read_text()) if found else -1


def bytes_on_disk(output: Path, commands: list[Command]) -> int:
    """Return the bytes of files of signals: whole ones, partial ones, and removed but open ones."""
    sizes = {}
    for file in output.glob("tiny/teacher-signals-*/*/*.safetensors"):
        with suppress(FileNotFoundError):
            status = file.stat()
            sizes[status.st_ino] = status.st_size
    for command in commands:
        with suppress(FileNotFoundError, ProcessLookupError):
            maps = Path(f"/proc/{command.pid}/maps").read_text()
            for start, end, inode in re.findall(
                r"^(\w+)-(\w+) .* (\d+) +\S*teacher-signals\S* \(deleted\)$", maps, re.M
            ):
                sizes.setdefault(int(inode), int(end, 16) - int(start, 16))
    return sum(sizes.values())


def assert_within_limit(output: Path, commands: list[Command]) -> None:
    """Wait for commands to end, and look at the disk all the time."""
    most = 0
    while any(command.poll() is None for command in commands):
        most = max(most, bytes_on_disk(output, commands))
        time.sleep(0.005)
    said = [command.communicate()[1] for command in commands]
    assert [command.returncode for command in commands] == [0] * len(commands), said
    assert 0 < most <= LIMIT_BYTES


def test_a_limit_changes_no_bit_of_the_student(run: Path, student: bytes, tmp_path: Path) -> None:
    unlimited = started.run("distill", run, f"--output={tmp_path / 'all'}", *OPTIONS, CACHE)
    assert unlimited.returncode == 0, unlimited.stderr
    assert files(tmp_path / "all") == set(range(19))
    assert weights(tmp_path / "all") == student

    output = tmp_path / "few"
    assert_within_limit(output, [Command("distill", run, f"--output={output}", *LIMITED)])
    assert weights(output) == student
    assert files(output) == set(), "another student cannot read them"
    # A worker for a finished student does not wait for it, even after `post-dist clean`.
    (signals,) = output.glob("tiny/teacher-signals-*")
    shutil.rmtree(signals)
    late = started.run("signals", run, f"--output={output}", *LIMITED, timeout=60)
    assert late.returncode == 0, late.stderr
    assert files(output) == set()


def test_two_ranks_train_the_same_student_within_a_limit(run: Path, tmp_path: Path) -> None:
    for name, options in (("none", OPTIONS), ("few", LIMITED)):
        ranks = run_ranks("distill", run, f"--output={tmp_path / name}", *options)
        assert [rank.returncode for rank in ranks] == [0, 0], ranks
    assert weights(tmp_path / "few") == weights(tmp_path / "none")


def test_a_killed_student_makes_removed_files_again(
    run: Path, student: bytes, tmp_path: Path
) -> None:
    command = ("distill", run, f"--output={tmp_path}", *LIMITED)
    killed = Command(*command)
    # The checkpoint of step 20 needs file 6, whose slot file 9 has.
    wait_for(killed, lambda: first_read(tmp_path) >= 10)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    checkpoints = {path.name for path in tmp_path.glob("tiny/distill-*/checkpoints/step-*")}
    assert checkpoints == {"step-20"}
    assert 6 not in files(tmp_path)
    assert_within_limit(tmp_path, [Command(*command)])
    assert weights(tmp_path) == student


@contextmanager
def two_workers(run: Path, output: Path, *options: str) -> Iterator[list[Command]]:
    """Start two workers, and wait until they may make no more files."""
    workers = [Command("signals", run, f"--output={output}", *LIMITED, *options) for _ in range(2)]
    try:
        wait_for(workers[0], lambda: len(files(output)) == SLOTS)
        yield workers
    finally:
        for worker in workers:
            worker.send_signal(signal.SIGKILL)


def test_workers_wait_for_the_student_and_end_by_themselves(
    run: Path, student: bytes, tmp_path: Path
) -> None:
    # The student starts later than the watchdog waits for anything else.
    with two_workers(run, tmp_path, "--set=engine.hang_timeout_seconds=8") as workers:
        time.sleep(12)
        assert files(tmp_path) == {0, 1, 2}
        training = Command("distill", run, f"--output={tmp_path}", *LIMITED)
        assert_within_limit(tmp_path, [*workers, training])
        said = [worker.communicate()[1] for worker in workers]
    assert all("distill.cache_gib is reached: waiting for distill" in errors for errors in said)
    assert weights(tmp_path) == student


def test_a_waiting_worker_leaves_when_it_is_asked_to(run: Path, tmp_path: Path) -> None:
    with two_workers(run, tmp_path) as workers:
        # They have written the last file, and wait.
        time.sleep(2)
        asked = time.monotonic()
        for worker in workers:
            worker.send_signal(signal.SIGTERM)
        said = [worker.communicate(60)[1] for worker in workers]
        assert time.monotonic() - asked < 5
    assert [worker.returncode for worker in workers] == [6, 6], said
    assert all("the teacher signals written so far are kept" in errors for errors in said)


@pytest.mark.parametrize("command", ["distill", "signals"])
def test_what_a_limit_does_not_go_with_is_refused(
    run: Path, main: Callable, tmp_path: Path, command: str
) -> None:
    given = (command, run, f"--output={tmp_path}", *LIMITED)
    code, _, said = main(*given, "--set=distill.steps=200")
    assert code == 2
    assert re.search(r"the steps read 4000 sequences, and the corpus has \d{4}: a second", said)
    assert "leave distill.cache_gib out" in said
    code, _, said = main(*given, "--set=distill.cache_gib=1e-5")
    assert code == 2
    assert "a step needs room for 3" in said
    least = re.search(r"set it to at least (\S+),", said)[1]
    code, _, said = main(command, run, "--set=distill.cache_gib=1")
    assert code == 2
    assert "cache_gib limits a cache, and cache is none" in said
    assert not list(tmp_path.glob("tiny/teacher-signals-*"))
    # Three files are all that seven steps read.
    code, _, said = main(*given, f"--set=distill.cache_gib={least}", "--set=distill.steps=7")
    assert code == 0, said


def test_plan_and_check_know_the_limit(run: Path, main: Callable, tmp_path: Path) -> None:
    fits = (*LIMITED, "--set=corpus.max_tokens=16000")
    code, said, errors = main("plan", run, "--nodes=1", "--gpus-per-node=1", "--json", *fits)
    assert code == 0, errors
    assert json.loads(said)["stages"][0]["teacher_signals_gib"] == LIMIT_BYTES / 2**30
    assert main("check", run, *fits)[0] == 0
    for wrong, message in (
        ("--set=distill.cache_gib=1e-5", "distill.cache_gib: 1e-05 is too small"),
        ("--set=distill.steps=200", "a second epoch reads files that are gone"),
    ):
        for command in (("plan", run, "--nodes=1", "--gpus-per-node=1"), ("check", run)):
            code, said, errors = main(*command, *fits, wrong)
            assert code == 2
            assert message in " ".join((said + errors).split())
