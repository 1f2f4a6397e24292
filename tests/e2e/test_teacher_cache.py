"""Cached teacher signals: as good as the teacher, for any batch, number of ranks and student."""

import fcntl
import json
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import started
import tiny
import torch
from safetensors.torch import load_file
from started import Command, run_ranks, wait_for

from post_dist.runtime.metric_log import read_metric_log

FP32 = "--set=engine.precision=fp32"
RAN = "sequences to run"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_run(tmp_path_factory.mktemp("cache"))


def distilled(main: Callable, run: Path, output: Path, *options: str) -> tuple[Path, str]:
    code, said, errors = main("distill", run, f"--output={output}", "--json", *options)
    assert code == 0, errors
    return Path(json.loads(said)["artifact"]), errors


def losses(artifact: Path, term: str = "ce") -> list[float]:
    return [line[term] for line in read_metric_log(artifact.parent / "metrics.jsonl")]


@pytest.mark.parametrize("frozen", [0, 1])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_student_is_that_of_the_online_teacher(
    run: Path, main: Callable, tmp_path: Path, precision: str, frozen: int
) -> None:
    options = (
        f"--set=engine.precision={precision}",
        "--set=distill.steps=9",
        f"--set=student.frozen_lower_layers={frozen}",
    )
    online, _ = distilled(main, run, tmp_path, *options)
    cached, said = distilled(main, run, tmp_path, *options, "--set=distill.cache=hidden")
    assert RAN in said
    # With a product, a small divergence is the difference of numbers of about 6: the absolute
    # tolerance is ten roundings of those.
    for term in ("ce", "lm", "cos"):
        assert losses(cached, term) == pytest.approx(losses(online, term), rel=1e-5, abs=5e-6)
    expected = load_file(online / "model.safetensors")
    found = load_file(cached / "model.safetensors")
    for name, tensor in expected.items():
        if precision == "bf16":
            # Hidden states are kept, so nothing at all differs.
            assert torch.equal(found[name], tensor)
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-4)


def test_a_compiled_student_is_the_plain_one_and_has_signals_of_its_own(
    run: Path, main: Callable, tmp_path: Path, without_fusion: None
) -> None:
    # The last micro-batch of a step is a smaller one, so there are two shapes.
    options = (FP32, "--set=distill.steps=5", "--set=student.frozen_lower_layers=1")
    cached = "--set=distill.cache=hidden"
    plain, _ = distilled(main, run, tmp_path, *options, cached)
    for further in ((), (cached,)):
        compiled, _ = distilled(
            main, run, tmp_path / "compiled", *options, "--set=engine.compile=true", *further
        )
        for term in ("ce", "lm", "cos"):
            assert losses(compiled, term) == pytest.approx(losses(plain, term), rel=1e-4, abs=5e-6)
        expected = load_file(plain / "model.safetensors")
        found = load_file(compiled / "model.safetensors")
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert len({path.name for path in tmp_path.rglob("teacher-signals-*")}) == 2


def test_another_student_another_batch_and_two_ranks_read_the_same_files(
    run: Path, main: Callable, tmp_path: Path
) -> None:
    options = (FP32, "--set=distill.cache=hidden")
    distilled(main, run, tmp_path, *options)
    for other in ("--set=student.layers=[0, 2]", "--set=distill.batch_size=3"):
        _, said = distilled(main, run, tmp_path, *options, other)
        assert RAN not in said
    # In the other folder, two ranks fill the files.
    for folder in (tmp_path, tmp_path / "elsewhere"):
        ranks = run_ranks("distill", run, f"--output={folder}", *options, "--set=distill.steps=7")
        assert [rank.returncode for rank in ranks] == [0, 0], ranks
        assert (RAN in ranks[0].stderr) == (folder != tmp_path)
    one = next(tmp_path.glob("tiny/teacher-signals-*"))
    two = next((tmp_path / "elsewhere").glob("tiny/teacher-signals-*"))
    assert one.name == two.name
    assert contents(one) == contents(two)


def test_an_engine_that_changes_results_has_files_of_its_own(
    run: Path, main: Callable, tmp_path: Path
) -> None:
    options = (FP32, "--set=distill.cache=hidden", "--set=distill.steps=2")
    distilled(main, run, tmp_path, *options)
    further = "--set=engine.deepspeed={zero_optimization: {round_robin_gradients: true}}"
    for other, own_files in (("--set=engine.zero_stage=0", False), (further, True)):
        _, said = distilled(main, run, tmp_path, *options, "--set=student.layers=[0, 2]", other)
        assert (RAN in said) == own_files


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of each file of signals, by its name."""
    return {file.name: file.read_bytes() for file in folder.rglob("*.safetensors")}


def signal_of(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a cache folder, in the order of the places."""
    files = [load_file(file) for file in sorted(folder.rglob("*.safetensors"))]
    return {name: torch.cat([file[name] for file in files]) for name in files[0]}


@pytest.mark.parametrize(
    "settings",
    [
        "fp32 hidden",
        "fp32 hidden, no cosine",
        "bf16 hidden, frozen",
        "fp32 sampled, no cosine, frozen",
    ],
)
def test_what_is_kept_takes_as_much_as_was_planned(
    run: Path, main: Callable, tmp_path: Path, settings: str
) -> None:
    cache = "hidden" if "hidden" in settings else "sampled"
    options = [
        "corpus.max_tokens=640",
        "distill.steps=9",
        f"engine.precision={settings[:4]}",
        f"distill.cache={cache}",
        f"distill.alpha_cos={int('cosine' not in settings)}",
        f"student.frozen_lower_layers={int('frozen' in settings)}",
    ]
    given = [f"--set={option}" for option in options]
    distilled(main, run, tmp_path, *given)
    kept = signal_of(next(tmp_path.glob("tiny/teacher-signals-*")))
    code, said, errors = main("plan", run, "--nodes=1", "--gpus-per-node=1", "--json", *given)
    assert code == 0, errors
    planned = json.loads(said)["stages"][0]["teacher_signals_gib"] * 2**30
    assert planned == sum(tensor.nbytes for tensor in kept.values())


def test_samples_train_a_student_for_116_bytes_a_token(main: Callable, tmp_path: Path) -> None:
    run = tiny.write_run(tmp_path)
    tiny.write_csv(tmp_path / "public.csv", tiny.sentences(2000, 2))
    tiny.speak_up(tmp_path / "teacher")
    options = (
        FP32,
        "--set=distill.alpha_cos=0",
        "--set=distill.alpha_lm=0",
        "--set=distill.steps=150",
        "--set=distill.learning_rate=1e-2",
    )
    online, _ = distilled(main, run, tmp_path, *options)
    cached, _ = distilled(main, run, tmp_path, *options, "--set=distill.cache=sampled")
    files = list(tmp_path.glob("tiny/teacher-signals-*/*/*.safetensors"))
    tokens = sum(load_file(file)["entropy"].numel() for file in files)
    assert sum(file.stat().st_size for file in files) < 120 * tokens + 6000 * len(files)
    of_online = held_out_ce(online)
    of_cached = held_out_ce(cached)
    untrained = losses(online)[0]
    print(f"held out: {of_online:.3f} online, {of_cached:.3f} sampled, {untrained:.3f} untrained")
    assert of_cached - of_online < 0.2 * (untrained - of_online)


def held_out_ce(artifact: Path) -> float:
    manifest = json.loads((artifact / "post_dist.json").read_text())
    return manifest["config"]["held_out"]["ce"]


def test_signals_written_before_an_interruption_are_kept(main: Callable, tmp_path: Path) -> None:
    run = tiny.write_run(tmp_path)
    tiny.write_csv(tmp_path / "public.csv", tiny.sentences(3000, 2))
    options = (
        FP32,
        "--set=distill.cache=hidden",
        "--set=corpus.sequence_length=8",
        "--set=distill.batch_size=2000",
        "--set=distill.steps=1",
    )
    slow, fast = (f"--set=distill.micro_batch_size_per_gpu={size}" for size in (1, 200))
    process = Command("distill", run, f"--output={tmp_path}", *options, slow)
    while not list(tmp_path.glob("tiny/teacher-signals-*/*/0*.safetensors")):
        assert process.poll() is None, "it ended before it was interrupted"
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate()
    assert process.returncode == 6, said
    assert "the teacher signals written so far are kept" in said
    kept = {
        file: file.stat().st_mtime_ns
        for file in tmp_path.glob("tiny/teacher-signals-*/*/*.safetensors")
    }
    _, said = distilled(main, run, tmp_path, *options, fast)
    assert RAN in said
    assert " 0 files of" not in said
    assert all(file.stat().st_mtime_ns == written for file, written in kept.items())


def test_two_students_may_fill_one_folder_at_once(run: Path, tmp_path: Path) -> None:
    options = (f"--output={tmp_path}", FP32, "--set=distill.cache=hidden")
    both = [
        Command("distill", run, *options, f"--set=student.layers=[0, {layer}]") for layer in (2, 3)
    ]
    said = [process.communicate()[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said


def test_what_cannot_be_kept_is_refused(run: Path, main: Callable, tmp_path: Path) -> None:
    code, _, said = main("distill", run, f"--output={tmp_path}", "--set=distill.cache=sampled")
    assert code == 2
    assert "set distill.alpha_cos: 0" in said
    masked = tiny.write_run(tmp_path / "masked", "roberta")
    code, _, said = main("distill", masked, "--set=distill.cache=hidden")
    assert code == 2
    assert "a masked model reads a sequence with other masks each time" in said


LONG = (FP32, "--set=distill.cache=hidden", "--set=corpus.sequence_length=8")
LONG += ("--set=distill.batch_size=600", "--set=distill.steps=1")


@pytest.fixture(scope="module")
def by_one(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Distill from signals made in the process; return the run file, the signals, the student."""
    folder = tmp_path_factory.mktemp("signals")
    run = tiny.write_run(folder)
    tiny.write_csv(folder / "public.csv", tiny.sentences(600, 2))
    done = started.run("distill", run, f"--output={folder / 'alone'}", "--json", *LONG)
    assert done.returncode == 0, done.stderr
    student = Path(json.loads(done.stdout)["artifact"])
    return run, next(folder.glob("alone/tiny/teacher-signals-*")), student


@pytest.mark.parametrize("workers", [2, 4])
def test_workers_that_are_killed_leave_the_same_files_and_the_same_student(
    by_one: tuple[Path, Path, Path], main: Callable, tmp_path: Path, workers: int
) -> None:
    run, expected, student = by_one
    command = ("signals", run, f"--output={tmp_path}", *LONG)
    working = [Command(*command) for _ in range(workers)]
    # A worker dies as soon as a file is there: it holds at most one file that is not.
    while not list(tmp_path.glob("tiny/teacher-signals-*/*/0*.safetensors")):
        assert any(worker.poll() is None for worker in working)
        time.sleep(0.01)
    working[0].send_signal(signal.SIGKILL)
    said = [worker.communicate() for worker in working]
    assert all(worker.returncode == 0 for worker in working[1:]), said
    made = next(tmp_path.glob("tiny/teacher-signals-*"))
    assert len(contents(expected)) >= 8
    assert contents(made) == contents(expected)
    of_workers, errors = distilled(main, run, tmp_path, *LONG)
    assert RAN not in errors
    for name, tensor in load_file(student / "model.safetensors").items():
        assert torch.equal(load_file(of_workers / "model.safetensors")[name], tensor)


def test_the_student_trains_on_the_files_that_have_arrived(
    by_one: tuple[Path, Path, Path], main: Callable, tmp_path: Path
) -> None:
    """This process is a slow worker: it holds the locks of two files, and writes one of them."""
    run, *_ = by_one
    options = (*LONG[:3], "--set=distill.batch_size=64", "--set=distill.steps=8")
    student, _ = distilled(main, run, tmp_path / "alone", *options)
    (made,) = tmp_path.glob("alone/tiny/teacher-signals-*/000000")
    slow = tmp_path / "beside/tiny" / made.parent.name
    slow.mkdir(parents=True)
    with (slow / "claims").open("a") as claims:
        for late in (3, 5):
            fcntl.lockf(claims, fcntl.LOCK_EX, 1, late)
        training = Command("distill", run, f"--output={tmp_path / 'beside'}", *options)
        # It trains as far as it can, and makes the other files while it waits.
        wait_for(training, lambda: (taken(tmp_path), len(contents(slow))) == (3, 6))
        arriving = slow / "000000/arriving"
        shutil.copy(made / "000000003.safetensors", arriving)
        arriving.rename(arriving.with_name("000000003.safetensors"))
        wait_for(training, lambda: taken(tmp_path) == 5)
        training.send_signal(signal.SIGTERM)
        _, said = training.communicate()
    assert training.returncode == 6, said
    assert list(tmp_path.glob("beside/tiny/distill-*/checkpoints/step-5")), (
        "between two checkpoints"
    )
    # The slow worker is gone, so training makes its file.
    beside, said = distilled(main, run, tmp_path / "beside", *options)
    assert "resuming from step 5" in said
    assert contents(slow) == contents(made)
    for name, tensor in load_file(student / "model.safetensors").items():
        assert torch.equal(load_file(beside / "model.safetensors")[name], tensor)


def taken(folder: Path) -> int:
    """Return the number of steps that the run below `beside` has taken."""
    metrics = list(folder.glob("beside/tiny/distill-*/metrics.jsonl"))
    return len(read_metric_log(metrics[0])) if metrics else 0


@pytest.mark.slow
def test_a_worker_that_hangs_is_not_awaited_forever(
    run: Path, main: Callable, tmp_path: Path
) -> None:
    options = (f"--output={tmp_path}", *LONG, "--set=engine.hang_timeout_seconds=60")
    assert main("signals", run, *options)[0] == 0
    (first,) = tmp_path.rglob("000000000.safetensors")
    first.unlink()
    with (first.parents[1] / "claims").open("a") as claims:
        fcntl.lockf(claims, fcntl.LOCK_EX, 1, 0)
        done = started.run("distill", run, *options)
    assert done.returncode == 3
    assert f"no progress for 60 s in: waiting for another worker's file {first}" in done.stderr


def test_a_flipped_bit_is_found_by_name_and_made_again(
    by_one: tuple[Path, Path, Path], main: Callable, tmp_path: Path
) -> None:
    run, expected, _ = by_one
    command = ("distill", run, f"--output={tmp_path}", *LONG)
    assert main("signals", *command[1:])[0] == 0
    made = next(tmp_path.glob("tiny/teacher-signals-*"))
    file = sorted(made.rglob("*.safetensors"))[3]
    damaged = bytearray(file.read_bytes())
    damaged[-5] ^= 4
    file.write_bytes(damaged)
    code, _, said = main(*command)
    assert code == 3
    assert f"{file.name} was damaged" in said
    code, _, said = main(*command)
    assert code == 0, said
    assert contents(made) == contents(expected)


def test_signals_without_a_cache_are_refused(run: Path, main: Callable, tmp_path: Path) -> None:
    code, _, said = main("signals", run, f"--output={tmp_path}")
    assert code == 2
    assert "distill.cache is none" in said


@pytest.mark.slow
def test_twenty_kills_lose_one_file_each_at_most(main: Callable, tmp_path: Path) -> None:
    run = tiny.write_run(tmp_path)
    tiny.write_csv(tmp_path / "public.csv", tiny.sentences(1200, 2))
    options = (
        *LONG,
        "--set=distill.batch_size=1536",
        "--set=distill.micro_batch_size_per_gpu=4",
    )
    written: dict[Path, int] = {}
    for kill in range(20):
        worker = Command("signals", run, f"--output={tmp_path / 'killed'}", *options)
        while len(found := list(tmp_path.glob("killed/tiny/*/*/0*.safetensors"))) <= kill:
            assert worker.poll() is None
            time.sleep(0.005)
        worker.send_signal(signal.SIGKILL)
        worker.communicate()
        # What was there is not made again, and each start has added a file before it was killed.
        assert all(file.stat().st_mtime_ns == time_ns for file, time_ns in written.items())
        written = {file: file.stat().st_mtime_ns for file in found}
    for folder in ("killed", "alone"):
        code, _, said = main("signals", run, f"--output={tmp_path / folder}", *options)
        assert code == 0, said
    assert all(file.stat().st_mtime_ns == time_ns for file, time_ns in written.items())
    made, expected = (
        next(tmp_path.glob(f"{folder}/tiny/teacher-signals-*")) for folder in ("killed", "alone")
    )
    assert len(contents(expected)) == 24
    assert contents(made) == contents(expected)
