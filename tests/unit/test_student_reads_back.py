"""A student is loaded as its user will, before it gets its name."""

from pathlib import Path

import pytest
import tiny
import torch

from post_dist.errors import EnvironmentFault, InputError
from post_dist.models.load import load_whole
from post_dist.stages.distill.stage import _check_reads_back


def test_a_student_that_is_not_what_was_trained_is_told(tmp_path: Path) -> None:
    folder = tiny.write_model(tmp_path / "student", "llama", layers=2)
    trained = load_whole(folder, "fp32", torch.device("cpu")).model.state_dict()
    _check_reads_back(folder, "fp32", trained)
    name = next(iter(trained))
    with pytest.raises(EnvironmentFault, match=f"does not read back as it was written: {name}"):
        _check_reads_back(folder, "fp32", trained | {name: trained[name] + 1})
    for value in (float("nan"), float("inf")):
        with pytest.raises(InputError, match=f"{name} holds values that are not finite"):
            _check_reads_back(folder, "fp32", trained | {name: trained[name] + value})
