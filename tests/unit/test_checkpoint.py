"""Checkpoints and files on disk are complete, or are not there."""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import save_file

from post_dist.errors import ArtifactRefused, InputError
from post_dist.files import file_digest, fingerprint, make_folder, write_file
from post_dist.runtime import checkpoint, engine_checkpoint
from post_dist.runtime.checkpoint import (
    load_tensors,
    newest_step,
    optimizer_state,
    restore_newest,
    save_tensors,
    seal,
)
from post_dist.runtime.distributed import World
from post_dist.runtime.local_copies import LocalCopies
from post_dist.runtime.optimizers import averaging_from, make_optimizer, result_of

DAMAGE: dict[str, Callable[[Path], object]] = {
    "cut short": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "a bit flipped": lambda file: file.write_bytes(
        bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:]
    ),
    "deleted": lambda file: file.unlink(),
    "emptied": lambda file: file.write_bytes(b""),
}


def test_only_owner_and_group_may_write_to_a_new_folder(tmp_path: Path) -> None:
    given = tmp_path / "given"
    before = os.umask(0)
    try:
        given.mkdir()
        make_folder(given / "a/b/c", mode=0o700)
        make_folder(given / "a/b")
        write_file(given / "d/e", lambda partial: partial.write_text("x"))
    finally:
        os.umask(before)
    modes = {
        str(place.relative_to(given)): place.stat().st_mode & 0o777
        for place in (given, *(place for place in given.rglob("*") if place.is_dir()))
    }
    assert modes == {".": 0o777, "a": 0o755, "a/b": 0o755, "a/b/c": 0o700, "d": 0o775}


@pytest.mark.parametrize("place", ["file", "file/a", "file/a/b"])
def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=f"cannot write {tmp_path / place}: ") as refused:
        make_folder(tmp_path / place)
    assert refused.value.hint == "choose another place that you may write to"


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("file", ["state.safetensors", "checkpoint.json"])
def test_a_damaged_checkpoint_is_skipped(
    tmp_path: Path, file: str, damage: Callable[[Path], object]
) -> None:
    for step in (1, 2, 3):
        save_tensors(tmp_path, step, {"a": torch.full((4,), float(step))})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-2", "step-3"]
    assert newest_step(tmp_path) == 3
    damage(tmp_path / "step-3" / file)
    assert newest_step(tmp_path) == 2
    assert load_tensors(tmp_path, 2)["a"].tolist() == [2.0] * 4
    save_tensors(tmp_path, 3, {"a": torch.zeros(4)})
    assert newest_step(tmp_path) == 3


def test_a_folder_with_an_extra_file_is_not_what_was_written(tmp_path: Path) -> None:
    save_tensors(tmp_path, 1, {"a": torch.zeros(1)})
    (tmp_path / "step-1" / "more").write_text("x")
    assert newest_step(tmp_path) == 0


@pytest.mark.parametrize("place", ["checkpoints", "checkpoints/trial-3"])
def test_a_resumed_run_is_named_and_no_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    messages: list[str] = []
    monkeypatch.setattr(
        checkpoint.log, "info", lambda message, *values: messages.append(message % values)
    )
    save_tensors(tmp_path / "tune-1234" / place, 6, {"a": torch.zeros(1)})
    world = World(0, 1, 0, "none", torch.device("cpu"))
    assert checkpoint.start_step(tmp_path / "tune-1234" / place, "auto", world) == 6
    assert messages == ["resuming from step 6 of tune-1234"]


def test_two_may_write_one_file_at_once(tmp_path: Path) -> None:
    place = tmp_path / "answers"

    def fill(partial: Path) -> None:
        with partial.open("w") as file:
            file.write("mine, ")
            write_file(place, lambda other: other.write_text("another's"))
            assert place.read_text() == "another's"
            file.write("whole")

    write_file(place, fill)
    assert (place.read_text(), list(tmp_path.iterdir())) == ("mine, whole", [place])


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    place = tmp_path / "answers"

    def fail(partial: Path) -> None:
        partial.write_text("half")
        raise OSError(5, "Input/output error")

    with pytest.raises(InputError, match="Input/output error"):
        write_file(place, fail)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "averaged_sgd"])
@pytest.mark.parametrize("stop", [1, 5, 9])
def test_an_optimizer_goes_on_from_its_checkpoint(tmp_path: Path, name: str, stop: int) -> None:
    steps = 10
    gradients = torch.randn(steps, 4, generator=torch.Generator().manual_seed(0))

    def train(first: int, last: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        parameter = torch.zeros(4, requires_grad=True)
        group = {"params": [parameter], "lr": 0.1, **averaging_from(steps)}
        optimizer = make_optimizer(name, [group])
        world = World(0, 1, 0, "none", torch.device("cpu"))
        assert restore_newest([parameter], optimizer, tmp_path, "auto", world) == first
        values = []
        for step in range(first, last):
            parameter.grad = gradients[step].clone()
            optimizer.step()
            values.append(parameter.detach().clone())
        if last < steps:
            save_tensors(tmp_path, last, optimizer_state([parameter], optimizer))
        return result_of([parameter], optimizer), values

    (whole,), values = train(0, steps)
    train(0, stop)
    (resumed,), _ = train(stop, steps)
    assert torch.equal(resumed, whole)
    if name == "averaged_sgd":
        torch.testing.assert_close(whole, torch.stack(values[steps // 2 :]).mean(dim=0))
    else:
        assert torch.equal(whole, values[-1])


def test_training_goes_on_while_a_checkpoint_is_written(
    tmp_path: Path, main: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each write waits for the step that follows it, which a blocked loop would never take."""
    save_file = engine_checkpoint.save_file
    steps, saved = 6, []

    def steps_taken() -> int:
        (metrics,) = tmp_path.glob("runs/*/distill-*/metrics.jsonl")
        return len(metrics.read_text().splitlines())

    def save_slowly(tensors: dict[str, torch.Tensor], path: Path) -> None:
        step = int(path.parent.name.removeprefix(".step-").removesuffix(".partial"))
        deadline = time.monotonic() + 20
        while steps_taken() < min(step + 1, steps) and time.monotonic() < deadline:
            time.sleep(0.01)
        # What is written is the state of before, down to the count of the optimizer.
        assert int(tensors["adam_step"]) == step
        saved.append((step, steps_taken() > step or step == steps))
        save_file(tensors, path)

    monkeypatch.setattr(engine_checkpoint, "save_file", save_slowly)
    settings = ("--set=distill.checkpoint_every_steps=2", f"--output={tmp_path / 'runs'}")
    run = tiny.write_run(tmp_path)
    code, _, err = main("distill", run, f"--set=distill.steps={steps}", *settings)
    assert code == 0, err
    assert saved == [(2, True), (4, True), (6, True)]


def test_a_rank_keeps_two_copies_on_its_node(tmp_path: Path) -> None:
    copies = [LocalCopies(tmp_path / "node", rank) for rank in (1, 10)]
    digests = {}
    for step in (1, 2, 3):
        for rank, each in enumerate(copies):
            tensors = {"a": torch.full((4,), float(step + 10 * rank))}
            save_file(tensors, tmp_path / "original")
            digests[rank, step] = file_digest(tmp_path / "original")
            each.keep(tensors, digests[rank, step])
    # A copy is found by its digest, whichever rank asks.
    found = {key for key, digest in digests.items() if copies[0].find(digest)}
    assert found == {(0, 2), (0, 3), (1, 2), (1, 3)}
    copies[0].clear()
    assert {path.name.partition("-")[0] for path in (tmp_path / "node").iterdir()} == {"rank10"}


def test_a_folder_for_copies_that_cannot_be_read_ends_no_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copies = LocalCopies(tmp_path / ("x" * 300), 0)
    copies.keep({"a": torch.ones(1)}, "0" * 64)
    assert copies.find("0" * 64) is None
    copies.clear()
    assert "File name too long" in caplog.text


@pytest.mark.parametrize(("alike", "flipped"), [(True, True), (False, False), (False, True)])
def test_no_rank_reads_what_nobody_has_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, alike: bool, flipped: bool
) -> None:
    # Two ranks have saved, each with a copy on this node. One rank goes on.
    place = tmp_path / "checkpoints" / "step-7"
    place.mkdir(parents=True)
    digests = {}
    for rank in (0, 1):
        tensors = {f"w/weight/{5 * rank}": torch.arange(5) + 5.0 * rank}
        file = place / f"rank{rank}.safetensors"
        save_file(tensors, file)
        digests[file.name] = file_digest(file)
        LocalCopies(tmp_path / "node", rank).keep(tensors, digests[file.name])
    seal(place, digests)
    if flipped:
        DAMAGE["a bit flipped"](place / "rank0.safetensors")
    read = []
    monkeypatch.setattr(engine_checkpoint, "holds_state", lambda file, engine: alike)
    monkeypatch.setattr(
        engine_checkpoint, "restore_engine", lambda engine, files: read.extend(files)
    )
    copies = LocalCopies(tmp_path / "node", 0)
    alone = World(0, 1, 0, "none", torch.device("cpu"))
    start = engine_checkpoint.engine_start(place.parent, "auto", alone, copies)
    assert start.step == 7
    if alike:
        start.restore(None)
        assert [path.parent.name for path in read] == ["node"]
    elif not flipped:
        start.restore(None)
        assert [path.name for path in read] == list(digests)
    else:
        with pytest.raises(ArtifactRefused, match=r"rank0.safetensors is damaged, .*its copy"):
            start.restore(None)
        assert read == []


def test_hidden_files_do_not_make_another_model(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    before = fingerprint(tmp_path)
    # A desktop, and the hub's client at each download.
    (tmp_path / ".DS_Store").touch()
    metadata = tmp_path / ".cache" / "huggingface" / "download" / "config.json.metadata"
    metadata.parent.mkdir(parents=True)
    metadata.write_text("1764471600.5")
    assert fingerprint(tmp_path) == before
    (tmp_path / "model.safetensors").write_bytes(b"Weights")
    assert fingerprint(tmp_path) != before


def test_what_lies_beside_checkpoints_harms_none(tmp_path: Path) -> None:
    for step in (1, 2):
        save_tensors(tmp_path, step, {"a": torch.full((1,), float(step))})
    shutil.copytree(tmp_path / "step-2", tmp_path / "step-2.bak")
    (tmp_path / "step-2" / ".nfs0000000003c4").touch()
    assert newest_step(tmp_path) == 2
    # Other digits, a number in another form, a file, a link and a pipe are no checkpoints either.
    beside = ["step-2.bak", "step-1\u0662", "step-\u00b2", "step-09", f"step-{'9' * 200}"]
    for name in beside[1:]:
        shutil.copytree(tmp_path / "step-2", tmp_path / name)
    (tmp_path / "step-7").write_text("")
    (tmp_path / "step-8").symlink_to("step-2.bak")
    os.mkfifo(tmp_path / "step-9")
    assert newest_step(tmp_path) == 2
    save_tensors(tmp_path, 3, {"a": torch.zeros(1)})
    left = ["step-2", "step-3", *beside, "step-7", "step-8", "step-9"]
    assert {path.name for path in tmp_path.iterdir()} == set(left)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, "[]", '{"state.safetensors": 7}', "\xff"]
)
def test_a_seal_that_holds_anything_is_that_of_a_damaged_checkpoint(
    tmp_path: Path, text: str
) -> None:
    for step in (1, 2):
        save_tensors(tmp_path, step, {"a": torch.zeros(1)})
    (tmp_path / "step-2" / checkpoint.SEAL).write_text(text, encoding="latin-1")
    assert newest_step(tmp_path) == 1
    (tmp_path / "step-1" / checkpoint.SEAL).unlink()
    os.mkfifo(tmp_path / "step-1" / checkpoint.SEAL)
    assert newest_step(tmp_path) == 0


def test_a_copy_that_cannot_be_written_is_only_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "node").write_text("a file in the place of the folder")
    LocalCopies(tmp_path / "node", 0).keep({"a": torch.zeros(1)}, "0" * 64)
    assert "no second copy of the checkpoint on this node" in caplog.text


def test_a_copy_that_the_disk_cannot_read_or_delete_is_only_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    unreadable = tmp_path / f"rank0-{'0' * 64}.safetensors"
    unreadable.mkdir()
    copies = LocalCopies(tmp_path, 0)
    assert copies.find("0" * 64) is None
    assert "the original is read" in caplog.text
    copies.clear()
    assert "stays on this node" in caplog.text
