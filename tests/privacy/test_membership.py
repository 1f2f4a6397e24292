"""Membership inference: its arithmetic on made-up confidences, and the command on a small run."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny

from post_dist.artifacts.run_folder import RunFolder
from post_dist.config.load import load_run
from post_dist.config.schema import RunConfig
from post_dist.errors import EnvironmentFault
from post_dist.privacy.accounting import cost_of
from post_dist.privacy.calibration import private_plan
from post_dist.privacy.membership import attack, balanced_members, confidences
from post_dist.stages.membership import finished_result, shadow_privacy

ROOT = Path(__file__).resolve().parents[2]
SHADOWS = 8
ROWS = 2000
RATE = "true_positive_rate_at_1_percent_false"


def made_up(effect: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Confidences that are higher for members by `effect` deviations, and the members."""
    generator = np.random.default_rng(seed)
    members = balanced_members(SHADOWS, ROWS, seed)
    difficulty = 3 * generator.normal(size=ROWS)
    noise = generator.normal(size=members.shape)
    return difficulty + effect * members + noise, members


def test_each_row_is_in_half_of_the_shadow_prompts_and_each_pair_shares_all_rows() -> None:
    members = balanced_members(SHADOWS, ROWS, 1)
    assert (members.sum(axis=0) == SHADOWS // 2).all()
    assert (members.sum(axis=1) == ROWS // 2).all()
    assert (members[::2] ^ members[1::2]).all()


def test_confidence_is_the_log_odds_of_the_correct_class() -> None:
    scores = np.log(np.array([[0.2, 0.5, 0.3], [0.9, 0.05, 0.05]])) + 4.0
    found = confidences(scores, np.array([1, 0]))
    assert np.allclose(found, np.log([0.5 / 0.5, 0.9 / 0.1]))


def test_without_an_effect_the_attack_guesses() -> None:
    # Were each row's own side short of one shadow, the AUC would be 0.47 here.
    areas = [attack(*made_up(0.0, seed)).auc for seed in range(20)]
    assert abs(np.mean(areas) - 0.5) < 0.004


def test_the_attack_reaches_what_an_attacker_who_knows_the_densities_does() -> None:
    found = attack(*made_up(1.0))
    # With known means the AUC of a shift of one deviation is Phi(1 / sqrt 2) = 0.760, and the rate
    # is Phi(1 - 2.326) = 0.092. The means of three values are off by 0.58 deviations.
    assert 0.70 < found.auc < 0.76
    assert 0.04 < found.true_positive_rate < 0.092
    assert found.auc_error < 0.01


def test_confidences_without_any_spread_are_attacked_too() -> None:
    members = balanced_members(4, 40, 0)
    assert attack(np.zeros((4, 40)), members).auc == 0.5
    assert attack(members.astype(float), members).auc == 1.0


def lira(main: Callable, run: Path, *settings: str) -> dict:
    """Audit a run by membership inference."""
    sets = [f"--set={setting}" for setting in settings]
    code, out, err = main(
        "audit", run, "--attack=lira", "--shadows=4", "--rows=40", "--json", *sets
    )
    assert code == 0, err
    return json.loads(out)


def test_a_prompt_that_learned_its_rows_is_caught_and_a_private_one_is_not(
    tmp_path: Path, main: Callable
) -> None:
    run = tiny.write_run(tmp_path)
    # Words without meaning: whatever the prompt learns of them, it learns by heart.
    rows = [
        (f"{text} {number * 7919 % 1000}", number % 2)
        for number, (text, _) in enumerate(tiny.sentences(200, 1))
    ]
    tiny.write_csv(tmp_path / "private.csv", rows)
    tiny.speak_up(tmp_path / "teacher")
    assert main("distill", run)[0] == 0
    learning = ("tune.learning_rate=0.1", "tune.steps=200", "tune.num_virtual_tokens=20")
    plain = lira(main, run, *learning)
    assert plain["epsilon"] is None
    assert plain["student_auc"] > 0.6
    assert "transferred_auc" in plain

    private = lira(
        main,
        run,
        *learning,
        "privacy.enabled=true",
        "privacy.target_epsilon=0.5",
        "privacy.declared_examples=160",
        "privacy.target_delta=1e-5",
        "privacy.steps=20",
    )
    assert private["epsilon"] <= 0.5
    assert private["student_auc"] < plain["student_auc"] - 0.05
    assert private[f"most_{RATE}"] < 0.02

    # Everything but the numbers is deleted.
    folders = sorted(tmp_path.glob("runs/tiny/tune-membership-*"))
    assert len(folders) == 2
    for folder in folders:
        assert not (folder / "shadows").exists()
    # The same question is not asked twice.
    assert lira(main, run, *learning) == plain


def test_an_owner_audits_on_the_student_of_a_provider(tmp_path: Path, main: Callable) -> None:
    """The student has a manifest. It is admitted once, and all shadows use the copy."""
    run = tiny.write_run(tmp_path)
    assert main("distill", run, "--set=distill.steps=1")[0] == 0
    (made,) = tmp_path.glob("runs/tiny/distill-*/artifact")
    given = (f"inputs.student={made}", "teacher=null", "tune.steps=2", "tune.init_text=Classify")
    owner = tmp_path / "owner"
    found = lira(main, run, *given, f"output={owner}")
    assert 0 <= found["student_auc"] <= 1
    assert len(list(owner.glob("tiny/admitted/*"))) == 1


def test_a_refused_audit_leaves_no_private_rows_behind(tmp_path: Path, main: Callable) -> None:
    run = tiny.write_run(tmp_path)
    tiny.write_student(tmp_path / "student")
    given = (f"--set=inputs.student={tmp_path / 'student'}", "--set=teacher=null")
    # The template alone fills the context, which is found when a shadow is tuned.
    wrong = '--set=private_task.template="{text} %s"' % ("word " * 400)
    sizes = ("--attack=lira", "--shadows=4", "--rows=40")
    code, _, err = main("audit", run, *sizes, *given, wrong)
    assert code == 2, err
    assert not list(tmp_path.glob("runs/tiny/*/shadows"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--shadows=5",), "give an even number from 4 on"),
        (("--set=private_task.user_column=label",), "protects users"),
        (("--set=inputs.student=nowhere",), "nowhere"),
    ],
)
def test_what_cannot_be_attacked_is_refused(
    tmp_path: Path, main: Callable, arguments: tuple[str, ...], message: str
) -> None:
    run = tiny.write_run(tmp_path)
    code, _, err = main("audit", run, "--attack=lira", *arguments)
    assert code == 2
    assert message in err
    assert not (tmp_path / "runs").exists()


def test_shadows_that_a_killed_audit_has_left_are_deleted(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, "tune", RunConfig(name="a"))
    rows = tmp_path / "shadows/shadow-0.jsonl"
    rows.parent.mkdir()
    rows.write_text("private")
    assert finished_result(folder) is None
    assert rows.exists()
    (tmp_path / "membership.json").write_text("{}")
    assert finished_result(folder) == {}
    assert not rows.parent.exists()


@pytest.mark.parametrize("text", ["", "[]", "[" * 100_000, '{"student_auc": NaN}'])
def test_a_damaged_result_is_named(tmp_path: Path, text: str) -> None:
    file = tmp_path / "membership.json"
    file.write_text(text)
    with pytest.raises(EnvironmentFault, match=r"membership.json is damaged") as refused:
        finished_result(RunFolder(tmp_path, "tune", RunConfig(name="a")))
    assert "delete it" in refused.value.hint


def test_a_shadow_prompt_says_that_it_is_not_private() -> None:
    """It is tuned on private rows, and the ledger of the data does not know it."""
    privacy = {"enabled": True, "target_epsilon": 8.0, "declared_examples": 160}
    config = RunConfig(name="a", privacy=privacy, tune={"batch_size": 16})
    shadow = shadow_privacy(config, 40)
    assert shadow.noise_source == "seeded"
    assert shadow.target_epsilon == 8.0


def test_the_page_has_the_bound_of_the_run_that_it_describes() -> None:
    settings = ["privacy.enabled=true", "privacy.expected_batch_size=100"]
    config = load_run(ROOT / "examples/demo.yaml", [*settings, "privacy.target_epsilon=8"])
    # Four shadow prompts on 600 examples have 300 members each.
    shadow = config.model_copy(update={"privacy": shadow_privacy(config, 300)})
    plan = private_plan(shadow)
    bound = cost_of([plan], plan).true_positive_rate
    page = (ROOT / "docs/privacy.md").read_text()
    assert re.findall(r"(\d+)% of true positives", page) == [f"{100 * bound:.0f}"]
