"""`--minutes`: settings of a private run for the time that there is."""

import json
import random
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import tiny
import yaml
from e2e.test_head import write_run as write_head_run
from e2e.test_lora import write_lora_run
from started import run_ranks

from post_dist.config.schema import RunConfig
from post_dist.errors import InputError
from post_dist.privacy import tuned_lora
from post_dist.privacy.suggested_settings import LEAST_GRADIENTS, suggested_plan
from post_dist.stages.tune.speed import TuningSpeed
from post_dist.stages.tune.timed_settings import kept_speed, plan_for

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
    asked = ("--minutes=0.5", "--epsilon=8", f"--output={tmp_path / 'out'}", *STUDENT, *DECLARED)
    code, out, err = main("privacy", run, *asked, "--json")
    assert code == 0, err
    told = json.loads(out)
    assert told["epsilon"] <= 8
    assert told["gradients_per_second"] > 10

    code, out, err = main("tune", run, *asked)
    assert code == 0, err
    # A machine is never as fast as before, so the second command must not have measured again.
    privacy = settings_of(tmp_path / "out")
    assert privacy["target_epsilon"] == 8
    assert privacy["steps"] == told["steps"] == told["privacy.steps"]
    assert privacy["expected_batch_size"] == told["privacy.expected_batch_size"]
    # A limit on the total, or a place of the ledger, is no reason to measure again.
    kept = sorted((tmp_path / "out").rglob("speed-*.json"))
    assert main("privacy", run, *asked, "--set=privacy.max_total_epsilon=20")[0] == 0
    assert sorted((tmp_path / "out").rglob("speed-*.json")) == kept

    # The table finds the run with the settings that the last line names.
    alone = (*asked[2:], "--set=teacher=null", "--set=evaluate.baselines=[]")
    code, _, refusal = main("evaluate", run, *alone)
    assert (code, "tune is not finished for these settings" in refusal) == (2, True)
    _, _, settings = err.splitlines()[-1].partition("the same settings: ")
    sets = [f"--set={each.strip()}" for each in settings.split("--set") if each.strip()]
    code, _, err = main("evaluate", run, *alone, *sets)
    assert code == 0, err

    # More time is another plan.
    code, out, _ = main("privacy", run, "--minutes=2", *asked[1:], "--json")
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
    # The advice is a number of minutes that is enough.
    (needed,) = re.findall(r"give (\d+) minutes or more", err)
    assert main("privacy", run, f"--minutes={needed}", options[1])[0] == 0


@pytest.mark.parametrize(
    ("adapter", "counts", "examples_read"),
    [
        ("head", {}, 1000),
        ("head", {"comparison_noise_multiplier": 20}, 1125),
        ("prompt", {"comparison_noise_multiplier": 20}, 250),
    ],
)
def test_the_validation_examples_take_time_too(
    adapter: str, counts: dict[str, float], examples_read: int
) -> None:
    task = {"name": "t", "visibility": "private", "path": "x"}
    task |= {"template": "{text}", "labels": {"0": ["a"], "1": ["b"]}}
    privacy = {"enabled": True, "target_epsilon": 8, "declared_examples": 1000}
    config = RunConfig.model_validate(
        {
            "name": "t",
            "private_task": task,
            "privacy": privacy,
            "tune": {"adapter": adapter, **counts},
        }
    )
    reading = 0.1 if adapter == "head" else 0.0
    speed = TuningSpeed(pass_seconds=0.1, pass_examples=1, lengths=0, reading_seconds=reading)
    needed = suggested_plan(adapter, LEAST_GRADIENTS, 1000)
    steps = needed["privacy.steps"] * speed.step_seconds(needed["privacy.expected_batch_size"])
    minutes = (steps + 0.1 * examples_read) / 60
    assert plan_for(config, speed, minutes + 0.001)
    with pytest.raises(InputError, match="are too few for a private run"):
        plan_for(config, speed, minutes - 0.001)


def test_the_speed_of_a_lora_is_that_of_a_plan_that_keeps_nothing(
    tmp_path: Path, main: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_lora_run(tmp_path)
    assert main("warm-start", run)[0] == 0
    kept = mock.Mock(side_effect=AssertionError("it was kept"))
    monkeypatch.setattr(tuned_lora, "LowerStates", kept)
    # The run file's own steps would read each example many times.
    options = ("--minutes=0.5", "--set=privacy.steps=2000", "--json")
    code, out, err = main("privacy", run, *options)
    assert code == 0, err
    assert json.loads(out)["gradients_per_second"] > 10


def test_one_of_several_ranks_measures(tmp_path: Path, main: Callable) -> None:
    run = write_head_run(tmp_path)
    assert main("warm-start", run)[0] == 0
    # A head reads examples, and asks all ranks of its world whether to stop.
    command = ("privacy", run, "--minutes=0.5", "--json")
    made = run_ranks(*command, preparations=("nothing", "nothing"))
    assert [rank.returncode for rank in made] == [0, 0], made[0].stderr
    (kept,) = tmp_path.rglob("speed-*.json")
    for damaged in ("", "[]", kept.read_text().replace('"pass_seconds": ', '"pass_seconds": -')):
        kept.write_text(damaged)
        with pytest.raises(InputError, match="holds no speed"):
            kept_speed(kept)


def test_no_step_needs_more_passes_than_its_time_has() -> None:
    speed = TuningSpeed(pass_seconds=1.0, pass_examples=16, lengths=8, reading_seconds=0.0)
    generator = random.Random(0)
    for batch_size in (1, 16, 64, 500):
        # Shorter examples come in larger passes.
        lengths = Counter(generator.randrange(8) for _ in range(batch_size))
        passes = sum(-(-count // (16 * 8 // (length + 1))) for length, count in lengths.items())
        assert passes <= speed.step_seconds(batch_size)


def test_what_the_run_file_says_of_a_prompt_stays(
    run: Path, tmp_path: Path, main: Callable
) -> None:
    asked = ("--minutes=1", "--epsilon=8", f"--output={tmp_path / 'out'}", *STUDENT, *DECLARED)
    code, out, err = main("privacy", run, *asked, "--set=privacy.learning_rate=0.5", "--json")
    assert code == 0, err
    told = json.loads(out)
    # The run file of these tests names the length of its prompt, and no clipping norm.
    assert "privacy.learning_rate" not in told
    assert "tune.num_virtual_tokens" not in told
    assert told["privacy.max_grad_norm"] == 1


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--minutes=1"], "set privacy.enabled: true and privacy.target_epsilon"),
        (
            ["--minutes=1", "--epsilon=8", "--set=private_task.max_length=9000"],
            "do not fit into the context",
        ),
        (["--minutes=1", "--epsilon=8", "--set=private_task.user_column=label"], "how many texts"),
        (["--minutes=1", "--epsilon=8", "--set=privacy.clip_quantile=0.5"], "clip_quantile"),
        (["--minutes=nan", "--epsilon=8"], "1000000"),
    ],
)
def test_what_has_no_time_that_can_be_known_is_refused(
    run: Path, tmp_path: Path, main: Callable, options: list[str], told: str
) -> None:
    code, _, err = main("tune", run, f"--output={tmp_path / 'out'}", *options, *STUDENT, *DECLARED)
    assert code == 2
    assert told in err
    assert not list(tmp_path.rglob("speed-*")), "a refused run measures nothing"
