"""`tune.comparison_noise_multiplier`: a private result beside what tuning began with."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
from e2e.test_head import artifact, write_run

from post_dist.artifacts.prompt import read_prompt
from post_dist.privacy.comparison import Comparison
from post_dist.stages.tune import stage

COMPARED = "--set=tune.comparison_noise_multiplier=2"


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
    # Noise from a seed is the same in each run of this test.
    still = ("--set=privacy.learning_rate=1.0e-9", "--set=privacy.noise_source=seeded")
    code, _, err = main("tune", run, COMPARED, *still)
    assert code == 0, err
    assert "cannot be told from what tuning began with" in err

    # A run that is killed behind its last step compares no second time.
    def full_disk(*given: object) -> None:
        raise OSError(28, "No space left on device")

    other = "--set=tune.optimizer=sgd"
    with monkeypatch.context() as patch:
        patch.setattr(stage, "write_tuned_prompt", full_disk)
        code, _, err = main("tune", run, COMPARED, *still, other)
        assert code != 0
    first = told(err)
    code, _, err = main("tune", run, COMPARED, *still, other)
    assert code == 0, err
    assert told(err) == first


@pytest.mark.parametrize(
    ("right", "message"),
    [
        (61, "+21 validation examples are right that were not before tuning"),
        (20, "the result is WORSE than what tuning began with"),
        (58, "cannot be told from what tuning began with"),
        (22, "cannot be told from what tuning began with"),
    ],
)
def test_two_deviations_tell_a_result_from_its_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, right: int, message: str
) -> None:
    counts = iter((40, right))
    part = SimpleNamespace(parameters=list, count_right=lambda parameters: next(counts))
    silent = SimpleNamespace(
        normal=lambda count, *purpose: [0.0] * count, commitment=lambda data, *purpose: ""
    )
    ledger = SimpleNamespace(intend_score=lambda trial, commitment: None)
    plan = SimpleNamespace(score_noise_multiplier=9.9)
    run = SimpleNamespace(plan=plan, source=silent, checkpoints=tmp_path, ledger=ledger)
    with caplog.at_level("INFO", "post_dist"):
        Comparison(SimpleNamespace(part=part, run=run)).finish([])
    assert message in caplog.text
    assert (caplog.records[0].levelname == "INFO") is (right == 61)


def test_an_audit_by_membership_compares_nothing(tmp_path: Path, main: Callable) -> None:
    run = write_run(tmp_path)
    assert main("warm-start", run)[0] == 0
    sizes = ("--shadows=4", "--rows=80")
    few = ("--set=privacy.expected_batch_size=20", "--set=privacy.steps=2")
    code, _, err = main("audit", run, "--attack=lira", COMPARED, *sizes, *few)
    assert code == 0, err


@pytest.mark.parametrize(
    "counts", [COMPARED, "--set=tune.search={mean_trials: 2, learning_rate: [0.1]}"]
)
def test_missing_validation_examples_show_before_anything_is_charged(
    tmp_path: Path, main: Callable, counts: str
) -> None:
    run = write_run(tmp_path)
    assert main("warm-start", run)[0] == 0
    code, out, err = main("check", run, counts, "--set=private_task.validation_share=0")
    assert code == 2
    assert "the validation split is empty" in out + err
    code, _, err = main("tune", run, counts, "--set=private_task.validation_share=0")
    assert code == 2
    assert "the validation split is empty" in err
    # A search is charged in full from its first row on.
    ledger = tmp_path / "private.csv.ledger.jsonl"
    assert not ledger.exists() or '"opened"' not in ledger.read_text()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("tune.search={mean_trials: 2, learning_rate: [0.1]}", "does not go with tune.search"),
        ("private_task.user_column=label", "it counts examples, not people"),
        ("tune.comparison_noise_multiplier=0.1", "greater than or equal to 0.2"),
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
    assert "tune.comparison_noise_multiplier is for tasks with classes" in err
