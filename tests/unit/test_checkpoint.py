"""Checkpoints: only one that is as it was written counts."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from post_dist.runtime.checkpoint import load_tensors, newest_step, save_tensors

DAMAGE: dict[str, Callable[[Path], object]] = {
    "cut short": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "a bit flipped": lambda file: file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:]),
    "deleted": lambda file: file.unlink(),
    "emptied": lambda file: file.write_bytes(b""),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("file", ["state.safetensors", "checkpoint.json"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, file: str, damage: Callable[[Path], object]) -> None:
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
