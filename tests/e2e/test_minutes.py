"""`--minutes`: settings of a private run for the time that there is."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import yaml
from e2e.test_head import write_run as write_head_run

STUDENT = ("--set=inputs.student=student", "--set=inputs.trust_model=true")
DECLARED = ("--set=privacy.declared_examples=160", "--set=privacy.ledger_anchors=anchors")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The run file of an owner who tunes a prompt on a student."""
    tiny.write_model(tmp_path / "student", "llama", seed=1)
    return tiny.write_run(tmp_path)


def settings_of(output: Path) -> dict:
    """Return the settings of the one run of tuning."""
    (found,) = output.rglob("tune-????????/resolved.yaml")
    return yaml.safe_load(found.read_text())["privacy"]


def test_tuning_takes_the_steps_that_privacy_names(
    run: Path, tmp_path: Path, main: Callable
) -> None:
    asked = ("--minutes=0.05", "--epsilon=8", f"--output={tmp_path / 'out'}", *STUDENT, *DECLARED)
    code, out, err = main("privacy", run, *asked, "--json")
    assert code == 0, err
    told = json.loads(out)
    assert told["epsilon"] <= 8
    assert told["gradients_per_second"] > 10

    code, out, err = main("tune", run, *asked)
    assert code == 0, err
    # The machine is never as fast as before, so the second command must not have measured again.
    privacy = settings_of(tmp_path / "out")
    assert privacy["target_epsilon"] == 8
    assert privacy["steps"] == told["steps"] == told["privacy.steps"]
    assert privacy["expected_batch_size"] == told["privacy.expected_batch_size"]
    gradients = told["steps"] * told["privacy.expected_batch_size"]
    assert gradients == pytest.approx(3 * told["gradients_per_second"], rel=0.2)

    # The table finds the run with the settings that the last line names.
    alone = (*asked[2:], "--set=teacher=null", "--set=evaluate.baselines=[]")
    code, _, refusal = main("evaluate", run, *alone)
    assert (code, "tune is not finished for these settings" in refusal) == (2, True)
    _, _, settings = err.splitlines()[-1].partition("the same settings: ")
    sets = [f"--set={each.strip()}" for each in settings.split("--set") if each.strip()]
    code, _, err = main("evaluate", run, *alone, *sets)
    assert code == 0, err

    # More time is another plan.
    code, out, _ = main("privacy", run, "--minutes=0.2", *asked[1:], "--json")
    assert json.loads(out)["steps"] > told["steps"]


def test_a_head_needs_time_to_read_its_examples(tmp_path: Path, main: Callable) -> None:
    run = write_head_run(tmp_path)
    assert main("warm-start", run)[0] == 0
    code, out, err = main("privacy", run, "--minutes=0.5", "--json")
    assert code == 0, err
    told = json.loads(out)
    assert (told["privacy.expected_batch_size"], told["steps"]) == (16, 400)
    options = ("--minutes=0.5", "--set=privacy.declared_examples=100000000")
    code, _, err = main("privacy", run, *options)
    assert code == 2
    assert "0.5 minutes are too few" in err


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--minutes=1"], "give --epsilon too"),
        (
            ["--minutes=1", "--epsilon=8", "--set=private_task.max_length=9000"],
            "do not fit into the context",
        ),
        (["--minutes=1", "--epsilon=8", "--set=private_task.user_column=label"], "how many texts"),
    ],
)
def test_what_has_no_time_that_can_be_known_is_refused(
    run: Path, tmp_path: Path, main: Callable, options: list[str], told: str
) -> None:
    code, _, err = main("tune", run, f"--output={tmp_path / 'out'}", *options, *STUDENT, *DECLARED)
    assert code == 2
    assert told in err
    assert not list(tmp_path.rglob("minutes-*")), "a refused run leaves no settings"
