"""What distillation refuses, and what it does with a loss that is not finite."""

import errno
import multiprocessing
import os
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import tiny
import torch

from post_dist.artifacts.run_folder import run_folder
from post_dist.config.load import load_run
from post_dist.config.schema import Distill, RunConfig, Student
from post_dist.conflicts import Layout
from post_dist.errors import EnvironmentFault, InputError
from post_dist.files import lock_file
from post_dist.losses.distillation import TermValues
from post_dist.models.facts import ModelFacts
from post_dist.models.load import load_whole
from post_dist.runtime.distributed import World
from post_dist.stages.distill.conflicts import conflicts
from post_dist.stages.distill.online_teacher import OnlineTeacher
from post_dist.stages.distill.signal_files import (
    SEQUENCES_A_FILE,
    SignalFiles,
    files_of,
    most_files_of_a_step,
)
from post_dist.stages.distill.signal_format import kept_bytes, kept_names
from post_dist.stages.distill.signal_worker import _Claims
from post_dist.stages.distill.trainer import _StandIn

LLAMA = ModelFacts(
    family="LlamaForCausalLM",
    layers=4,
    width=32,
    vocabulary=600,
    context_length=128,
    masked=False,
    tied=False,
    matrix_head=True,
    linear_head=True,
    scales_attention_by_layer=False,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_run(tmp_path_factory.mktemp("distill"))


def found(run: Path, settings: list[str], **facts: object) -> list[str]:
    config = load_run(run, settings, None)
    return [each.message for each in conflicts(config, replace(LLAMA, **facts), Layout())]


def test_the_teacher_s_signals_keep_nothing_for_a_backward_pass(tmp_path: Path) -> None:
    tiny.write_model(tmp_path / "teacher", "llama")
    teacher = load_whole(tmp_path / "teacher", "fp32", torch.device("cpu")).requires_grad_(True)
    signals = OnlineTeacher(teacher, 1).signals_of([0], torch.full((1, 4), 5), None)
    assert not signals.hidden.requires_grad


def test_a_run_file_that_fits_has_no_conflict(run: Path) -> None:
    assert found(run, []) == []


@pytest.mark.parametrize(
    ("settings", "facts", "message"),
    [
        (["student.freeze_head=false"], {"tied": True}, "embeddings and head are one tensor"),
        ([], {"scales_attention_by_layer": True}, "scales attention by the number of the layer"),
        (
            ["student.num_layers=9"],
            {},
            "asks for 9 layers, up to number 8; the teacher has layers 0 to 3",
        ),
        (
            ["student.layers=auto", "student.num_layers=9"],
            {},
            "asks for 9 layers, up to number 8; the teacher has layers 0 to 3",
        ),
        (
            ["student.layers=[1, 2]", "student.frozen_lower_layers=1"],
            {},
            "student.frozen_lower_layers is 1, but the student's layers are [1, 2]",
        ),
        (["distill.cache=sampled"], {}, "which the cosine distance of hidden states compares"),
        (
            ["distill.cache=sampled", "distill.alpha_cos=0"],
            {"matrix_head": False},
            "needs a head that is one matrix",
        ),
        (["distill.cache=hidden"], {"masked": True}, "other masks each time"),
        (["engine.zero_stage=3", "student.freeze_head=false"], {}, "a trained head does not go"),
        (["engine.compile=true", "engine.zero_stage=3"], {}, "the student is sharded here"),
        (["engine.compile=true", "engine.offload=cpu"], {}, "the large LLM is sharded here"),
        ([], {"context_length": 16}, "exceeds the teacher's context of 16"),
    ],
)
def test_each_conflict_is_found_alone(
    run: Path, settings: list[str], facts: dict, message: str
) -> None:
    messages = found(run, settings, **facts)
    assert len(messages) == 1
    assert message in messages[0]


def test_compiled_models_are_whole_on_each_of_two_ranks(run: Path) -> None:
    config = load_run(run, ["engine.compile=true"], None)
    (conflict,) = conflicts(config, LLAMA, Layout(ranks=2, ranks_per_node=2))
    assert "the large LLM is sharded here" in conflict.message
    config = load_run(run, ["engine.compile=true", "engine.shard_group=1"], None)
    assert not conflicts(config, LLAMA, Layout(ranks=2, ranks_per_node=2))


def test_a_missing_section_is_a_conflict(run: Path) -> None:
    config = RunConfig.model_construct(corpus=None, student=None)
    (conflict,) = conflicts(config, LLAMA, Layout())
    assert "the run file lacks the sections corpus, student" in conflict.message


@pytest.mark.parametrize(
    ("distill", "student", "exact_product", "names"),
    [
        ({"cache": "hidden"}, {}, True, ["entropy", "hidden", "product"]),
        ({"cache": "hidden", "alpha_cos": 0}, {}, True, ["entropy", "product"]),
        ({"cache": "hidden", "alpha_cos": 0}, {}, False, ["hidden"]),
        ({"cache": "hidden"}, {"freeze_head": False}, True, ["hidden"]),
        ({"cache": "hidden"}, {"frozen_lower_layers": 1}, False, ["below", "hidden"]),
        ({"cache": "sampled"}, {"frozen_lower_layers": 1}, True, ["entropy", "samples"]),
    ],
)
def test_what_a_cache_keeps(
    distill: dict, student: dict, exact_product: bool, names: list[str]
) -> None:
    section = Distill(**distill)
    rule = Student(layers=(0, 1, 3), **student)
    assert kept_names(section, rule, exact_product=exact_product) == names
    if "samples" in names:
        assert kept_bytes(names, width=4096, bytes_each=2) == 116


class FakeEngine:
    """Returns given losses in turn, and remembers what it was called with."""

    def __init__(self, losses: list[float]) -> None:
        self._losses = iter(losses)
        self.calls: list[str] = []

    def __call__(self, name: str) -> tuple[torch.Tensor, TermValues, None]:
        self.calls.append(name)
        loss = torch.tensor(next(self._losses))
        return loss, TermValues({"ce": loss, "lm": loss, "cos": loss}), None


ALONE = World(0, 1, 0, "none", torch.device("cpu"))


def test_the_last_good_micro_batch_stands_in_with_weight_zero() -> None:
    stand_in = _StandIn(ALONE, torch.float32)
    engine = FakeEngine([1.0, float("nan"), 2.0, 3.0])
    assert stand_in.forward(engine, ("first",), 0)[0] == 1.0
    loss, terms = stand_in.forward(engine, ("second",), 1)
    assert loss == 0.0
    assert terms["ce"] == 2.0, "the metrics are those of the replacement"
    assert stand_in.forward(engine, ("third",), 2)[0] == 3.0
    assert engine.calls == ["first", "second", "first", "third"]
    assert stand_in.guard.skipped == 1


def test_the_first_micro_batch_has_no_replacement() -> None:
    with pytest.raises(InputError, match="the first micro-batch is not finite on rank 0"):
        _StandIn(ALONE, torch.float32).forward(FakeEngine([float("inf")]), ("first",), 0)


@pytest.mark.parametrize(
    ("precision", "step", "hint"),
    [
        (torch.float32, 0, "check that the teacher's weights are finite"),
        (
            torch.bfloat16,
            0,
            "check that the teacher's weights are finite, or set engine.precision to fp32",
        ),
        (torch.float32, 7, "lower distill.learning_rate"),
        (
            torch.float16,
            7,
            "lower distill.learning_rate, or set engine.precision to bf16 or fp32",
        ),
    ],
)
def test_the_hint_names_what_may_have_done_it(precision: torch.dtype, step: int, hint: str) -> None:
    with pytest.raises(InputError) as caught:
        _StandIn(ALONE, precision).forward(FakeEngine([float("inf")]), ("first",), step)
    assert caught.value.hint == hint


def test_five_bad_micro_batches_in_a_row_end_the_run() -> None:
    stand_in = _StandIn(ALONE, torch.float32)
    stand_in.forward(FakeEngine([1.0]), ("good",), 0)
    for step in range(1, 5):
        stand_in.forward(FakeEngine([float("nan"), 1.0]), ("bad",), step)
    message = r"5 micro-batches in a row were not finite, up to step 5 \(on rank 0\)"
    with pytest.raises(InputError, match=message):
        stand_in.forward(FakeEngine([float("nan")]), ("bad",), 5)


def test_two_workers_never_claim_one_file(tmp_path: Path) -> None:
    """Another process gets other files, until the one that claimed them is gone."""
    files = SignalFiles(tmp_path / "signals", 3 * SEQUENCES_A_FILE)
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    def claim_as_asked(asked: Connection) -> None:
        claims = _Claims(files, 3)
        while asked.recv():
            asked.send(claims.next(3, 1))

    other = context.Process(target=claim_as_asked, args=(theirs,), daemon=True)
    other.start()
    ours.send(True)
    assert ours.recv() == (0, [0], False)
    claims = _Claims(files, 3)
    assert claims.next(1, 3) == (0, [1, 2], False), (
        "later files while another worker makes the first one"
    )
    with (files.folder / "lock").open("a") as lock:
        assert not lock_file(lock), "`clean` must see that workers are here"
    other.kill()
    other.join()
    assert claims.next(1, 3) == (0, [0, 1, 2], False), "the file of a dead worker is free at once"
    files.path(0).parent.mkdir()
    files.path(0).touch()
    assert claims.next(1, 3) == (1, [], False), "what is wanted exists"
    claims.close()


def test_with_a_limit_a_file_takes_the_slot_of_one_that_was_read(tmp_path: Path) -> None:
    """Ten files share three slots."""
    files = SignalFiles(tmp_path / "signals", 10 * SEQUENCES_A_FILE, 3)
    claims = _Claims(files, 10)

    def made(wanted: int, at_most: int) -> list[int]:
        """Claim files and write them."""
        _, claimed, _ = claims.next(wanted, at_most)
        for file in claimed:
            files.path(file).parent.mkdir(exist_ok=True)
            files.path(file).touch()
        return claimed

    def on_disk() -> list[int]:
        names = [path.name for path in files.folder.glob("*/*.safetensors")]
        return sorted(int(name.split(".")[-2]) for name in names)

    assert made(10, 9) == [0, 1, 2]
    assert claims.next(10, 9) == (3, [], True), "nothing was read yet"
    claims.move(2)
    # A process that was killed has left a part of a file.
    files.path(0).with_name(".12345678.000000004.safetensors").touch()
    assert made(3, 1) == [], "what is wanted exists"
    assert made(4, 1) == [3]
    assert on_disk() == [1, 2, 3, 4], "what was read stays until a file needs its slot"
    assert made(10, 9) == [4]
    assert on_disk() == [2, 3, 4]
    # The student resumes from an earlier checkpoint.
    claims.move(0)
    assert claims.next(1, 1) == (0, [0], False)
    assert on_disk() == [2, 4], "file 3 has the slot of file 0"
    claims.move(9)
    assert made(10, 9) == [9]
    assert claims.next(10, 9) == (10, [], False), "the last file exists"
    files.remove_all()
    assert on_disk() == []
    assert claims.next(10, 9) == (10, [], False), "a worker makes no file for a finished student"
    claims.close()


def test_a_slot_has_one_writer(tmp_path: Path) -> None:
    """The student moves back while a worker makes a later file in the slot of an earlier one."""
    files = SignalFiles(tmp_path / "signals", 10 * SEQUENCES_A_FILE, 3)
    claims = _Claims(files, 10)
    claims.move(3)
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    def claim() -> None:
        others = _Claims(files, 10)
        theirs.send(others.next(10, 1))
        # It holds the lock until it is killed.
        theirs.recv()

    other = context.Process(target=claim, daemon=True)
    other.start()
    assert ours.recv() == (3, [3], False)
    claims.move(0)
    assert claims.next(10, 9) == (0, [1, 2], False)
    other.kill()
    other.join()
    claims.close()


def test_the_student_moves_between_two_claims(tmp_path: Path) -> None:
    """Otherwise a worker removes a file that the student has just found after it moved back."""
    files = SignalFiles(tmp_path / "signals", 10 * SEQUENCES_A_FILE, 3)
    claims = _Claims(files, 10)
    claims.move(3)
    student = multiprocessing.get_context("fork").Process(
        target=lambda: _Claims(files, 10).move(0), daemon=True
    )
    with claims._exclusive():
        student.start()
        student.join(1)
        assert files.first_read() == 3
    student.join()
    assert files.first_read() == 0
    claims.close()


@pytest.mark.parametrize("text", ["", "x", "-1", "4", "\u0663", " 3", "9" * 5000, "1e3", "\0\0"])
def test_a_damaged_number_of_the_first_file_is_named(tmp_path: Path, text: str) -> None:
    files = SignalFiles(tmp_path, 3 * SEQUENCES_A_FILE)
    assert files.first_read() == 0
    files.write_first_read(3)
    assert files.first_read() == 3
    (tmp_path / "first").write_text(text)
    with pytest.raises(EnvironmentFault, match="first is damaged") as refused:
        files.first_read()
    assert "delete it" in refused.value.hint
    (tmp_path / "first").unlink()
    os.mkfifo(tmp_path / "first")
    with pytest.raises(EnvironmentFault, match="first is damaged"):
        files.first_read()


def test_another_limit_resumes_the_same_run(run: Path) -> None:
    names = set()
    for settings in ([], ["distill.cache_gib=1"], ["distill.cache_gib=2"]):
        config = load_run(run, ["distill.cache=hidden", *settings], None)
        names.add(run_folder(config, "distill", {}).path.name)
    assert len(names) == 1


def test_a_limit_needs_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    claims = _Claims(SignalFiles(tmp_path, 10 * SEQUENCES_A_FILE, 3), 10)
    monkeypatch.setattr("fcntl.lockf", no_locks)
    with pytest.raises(EnvironmentFault, match="claims cannot be locked: No locks available"):
        claims.next(10, 1)


@pytest.mark.parametrize("batch_size", [1, 3, 20, 63, 64, 65, 96, 128, 130])
def test_the_files_of_a_step_are_counted(batch_size: int) -> None:
    counts = []
    for step in range(200):
        first = step * batch_size // SEQUENCES_A_FILE
        counts.append(files_of((step + 1) * batch_size) - first)
    assert max(counts) == most_files_of_a_step(batch_size)
