"""`privacy.comparison_noise_multiplier`: a private result beside what tuning began with."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
from e2e.test_head import artifact, write_run

from post_dist.artifacts.prompt import read_prompt
from post_dist.stages.tune import stage

COMPARED = "--set=privacy.comparison_noise_multiplier=2"


def told(err: str) -> str:
    """Return the one difference that a log tells."""
    (found,) = re.findall(r"deviation 2, ([+-]\d+) validation examples", err)
    return found


def test_a_result_is_compared_with_its_start(tmp_path: Path, main: Callable) -> None:
    run = write_run(tmp_path)
    assert main("warm-start", run)[0] == 0
    code, out, err = main("tune", run, COMPARED, "--json")
    assert code == 0, err
    # 20 validation examples cannot show more than a chance, with noise of 2.
    assert told(err)
    claim = read_prompt(artifact(tmp_path, "tune")).privacy
    assert claim["score_noise_multiplier"] == 2
    assert 7.9 < claim["epsilon"] <= 8
    code, out, err = main("verify", artifact(tmp_path, "tune"), "--json")
    assert code == 0, err
    assert json.loads(out)["epsilon"] == claim["epsilon"]
    code, out, err = main("budget", tmp_path / "private.csv.ledger.jsonl", "--json")
    assert code == 0, err
    assert json.loads(out)["epsilon"] == pytest.approx(claim["epsilon"], abs=1e-6)


def test_a_result_that_is_no_better_is_told(
    tmp_path: Path, main: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(tmp_path)
    assert main("warm-start", run)[0] == 0
    still = "--set=privacy.learning_rate=1.0e-9"
    code, _, err = main("tune", run, COMPARED, still)
    assert code == 0, err
    assert "cannot be told from what tuning began with" in err

    # A run that is killed behind its last step compares no second time.
    def full_disk(*given: object) -> None:
        raise OSError(28, "No space left on device")

    other = "--set=tune.optimizer=sgd"
    with monkeypatch.context() as patch:
        patch.setattr(stage, "write_tuned_prompt", full_disk)
        code, _, err = main("tune", run, COMPARED, still, other)
        assert code != 0
    first = told(err)
    code, _, err = main("tune", run, COMPARED, still, other)
    assert code == 0, err
    assert told(err) == first


def test_missing_validation_examples_show_before_the_first_step(
    tmp_path: Path, main: Callable
) -> None:
    run = write_run(tmp_path)
    assert main("warm-start", run)[0] == 0
    code, _, err = main("tune", run, COMPARED, "--set=private_task.validation_share=0")
    assert code == 2
    assert "the validation split is empty" in err
    code, out, _ = main("budget", tmp_path / "private.csv.ledger.jsonl", "--json")
    spent = json.loads(out) if code == 0 else {"runs": []}
    assert sum(each["steps_charged"] for each in spent["runs"]) == 0


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("tune.search={mean_trials: 2, learning_rate: [0.1]}", "does not go with tune.search"),
        ("private_task.user_column=label", "it counts examples, not people"),
        ("privacy.comparison_noise_multiplier=0.1", "greater than or equal to 0.2"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    tmp_path: Path, main: Callable, setting: str, message: str
) -> None:
    run = write_run(tmp_path)
    code, _, err = main("tune", run, COMPARED, f"--set={setting}")
    assert (code, message in err) == (2, True), err


def test_a_task_that_generates_text_is_not_compared(tmp_path: Path, main: Callable) -> None:
    run = tiny.write_run(tmp_path)
    task = ("--set=private_task.response_column=label", "--set=private_task.labels={}")
    code, _, err = main("tune", run, COMPARED, *task)
    assert code == 2
    assert "privacy.comparison_noise_multiplier is for tasks with classes" in err
