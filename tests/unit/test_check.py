"""`post-dist check`: every conflict at once, without weights."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml

from post_dist.artifacts.prompt import PromptContents, Provenance, write_prompt
from post_dist.artifacts.run_folder import run_folder
from post_dist.artifacts.task import PromptTask
from post_dist.config.load import load_run
from post_dist.models.load import load_tokenizer, tokenizer_fingerprint
from post_dist.privacy.calibration import private_plan
from post_dist.privacy.ledger import LedgerRun, claim_anchor_for, lock_ledger

STAGES = ["distill", "tune", "transfer", "evaluate"]

TRUST = "--set=inputs.trust_model=true"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A whole run without the weights of its teacher: a check that opens them fails."""
    path = tiny.write_run(tmp_path)
    for weights in (tmp_path / "teacher").glob("*.safetensors"):
        weights.unlink()
    return path


def checked(main: Callable, run: Path, *options: str) -> tuple[int, dict[str, Any]]:
    code, out, err = main("check", run, "--json", *options)
    assert err == ""
    return code, json.loads(out)


def messages(report: dict[str, Any]) -> list[str]:
    return [f"{each['stage']}: {each['message']}" for each in report["conflicts"]]


def without(run: Path, *sections: str) -> Path:
    fields = yaml.safe_load(run.read_text())
    for section in sections:
        fields.pop(section)
    run.write_text(yaml.safe_dump(fields))
    return run


def write_source_prompt(folder: Path, teacher: Path, width: int, length: int = 48) -> Path:
    task = PromptTask("Review: {text} It was", (("bad",), ("good",)), length, False, "good")
    tokenizer = tokenizer_fingerprint(load_tokenizer(teacher))
    origin = Provenance("the student", tokenizer, {"model": "1" * 64}, {})
    contents = PromptContents(torch.randn(5, width), task, None)
    write_prompt(folder, contents, origin, lambda path: None)
    return folder


def test_a_sound_run_is_checked_without_weights_in_seconds(run: Path, main: Callable) -> None:
    checked(main, run)  # imports
    start = time.process_time()
    code, report = checked(main, run)
    assert time.process_time() - start < 5
    assert code == 0
    assert report["ok"]
    assert report["stages"] == STAGES
    assert report["conflicts"] == []
    assert report["label_words"] == {"student": {"0": {"bad": "Ġbad"}, "1": {"good": "Ġgood"}}}
    assert report["epsilon"] == []
    assert "weights: there are no safetensors" in report["not_checked"][0]
    code, out, _ = main("check", run)
    assert code == 0
    assert "0: bad -> Ġbad" in out
    assert out.endswith("no conflicts: distill, tune, transfer, evaluate\n")


def test_everything_that_is_wrong_is_named_at_once(run: Path, main: Callable) -> None:
    wrong = {
        "corpus.sequence_length": "256",
        "corpus.text": "'{body}'",
        "student.num_layers": "9",
        "private_task.labels": "{0: [surprisingly unbelievable], 2: [good]}",
        "private_task.template": "'{text} {mask}'",
        "public_task.path": "nowhere.csv",
        "engine.precision": "fp16",
        "engine.shard_group": "3",
        "cluster.tasks_per_node": "4",
        "cluster.signals": "{workers: 2, tasks_per_node: 5}",
        "distill.cache": "hidden",
        "tune.num_virtual_tokens": "100",
    }
    options = [f"--set={key}={value}" for key, value in wrong.items()]
    code, report = checked(main, run, *options)
    assert code == 2
    assert not report["ok"]
    found = messages(report)
    for words in (
        "distill: corpus.sequence_length 256 exceeds the teacher's context of 128",
        f"distill: corpus.path: {run.parent / 'public.csv'}: there is no column 'body'",
        "distill: student.layers asks for 9 layers",
        "tune: the label word 'surprisingly unbelievable' is",
        "tune: private_task: row",
        "tune: template '{text} {mask}': {mask} is for masked models",
        "transfer: public_task.path:",
        "distill: engine.precision: fp16 does not run on a CPU",
        "distill: engine.shard_group: 4 ranks do not divide into groups of 3",
        "signals: engine.shard_group: 5 ranks do not divide into groups of 3",
        "tune: a prompt of 100 tokens and texts of 48 tokens do not fit",
    ):
        assert any(message.startswith(words) for message in found), (words, found)
    assert report["label_words"]["student"]["2"] == {"good": "Ġgood"}, "the sound words are shown"


def test_a_context_that_is_too_short_names_what_can_be_lowered(run: Path, main: Callable) -> None:
    tokens = "num_virtual_tokens"
    settings = (f"warm_start={{{tokens}: 100}}", f"tune.{tokens}=100", "public_task.max_length=200")
    code, report = checked(main, run, *(f"--set={each}" for each in settings))
    assert code == 2
    found = {each["message"]: each["hint"] for each in report["conflicts"]}
    context = "do not fit into the context of the"
    of_warm_start = {
        f"a prompt of 100 tokens and texts of 200 tokens {context} student (128)": (
            f"lower warm_start.{tokens} or public_task.max_length"
        ),
        f"texts of 200 tokens {context} teacher (128)": "lower public_task.max_length",
    }
    assert found.items() >= of_warm_start.items(), found


def test_two_classes_that_share_a_token_are_found_beside_a_long_word(
    run: Path, main: Callable
) -> None:
    labels = "--set=private_task.labels={0: [bad, impossible words], 1: [bad]}"
    code, report = checked(main, run, labels)
    assert code == 2
    assert "tune: the label words 'bad' and 'bad' share the token 'Ġbad'" in messages(report)
    assert any("'impossible words' is" in message for message in messages(report))


def test_errors_of_the_run_file_are_conflicts(run: Path, main: Callable) -> None:
    code, report = checked(main, run, "--set=tune.stepz=3", "--set=distill.steps=-1")
    assert code == 2
    assert [each["stage"] for each in report["conflicts"]] == ["run file", "run file"]
    assert any("tune.stepz: unknown key" in message for message in messages(report))
    code, report = checked(main, run.with_name("nowhere.yaml"))
    assert code == 2
    assert "cannot read the run file" in messages(report)[0]
    assert "post-dist init" in report["conflicts"][0]["hint"]


def test_nothing_of_a_private_file_is_printed(run: Path, main: Callable) -> None:
    private = run.with_name("private.csv")
    private.write_text("the secret diary of an owner,1\nanother secret,1\n")  # no header
    for options in ([], ["--json"]):
        code, out, err = main("check", run, *options)
        assert code == 2
        assert "private_task: there is no column 'text'" in out
        assert "secret" not in out + err

    rows = ["text,label"] + [f"some secret text {number},1" for number in range(37)]
    private.write_text("\n".join([*rows, "last secret,secretlabel"]) + "\n")
    code, out, err = main("check", run)
    assert code == 2
    assert "has a label in column 'label' that is not in private_task.labels" in out
    assert "secret" not in out + err
    assert "37" not in out.replace(str(run.parent), "the folder")


def test_a_split_without_examples_is_a_conflict(run: Path, main: Callable) -> None:
    options = ("--set=private_task.test_share=0", "--set=evaluate.split=test")
    code, report = checked(main, run, *options)
    assert code == 2
    assert messages(report) == ["evaluate: private_task: the test split is empty"]


def test_an_owner_checks_the_stages_that_are_hers(
    run: Path, main: Callable, tmp_path: Path
) -> None:
    without(run, "teacher", "student", "corpus", "public_task")
    owner = ["--set=evaluate.baselines=[]"]
    code, report = checked(main, run, *owner)
    assert code == 0, report
    assert report["stages"] == ["tune", "evaluate"]
    assert any("student is not in inputs.student" in reason for reason in report["not_checked"])

    given = f"--set=inputs.student={tmp_path / 'teacher'}"
    code, report = checked(main, run, *owner, given)
    assert code == 2
    assert "has no post_dist.json, so it cannot be checked" in messages(report)[0]
    owner.append(TRUST)
    code, report = checked(main, run, *owner, given)
    assert code == 0, report
    assert report["label_words"]["student"]["1"] == {"good": "Ġgood"}
    code, report = checked(main, run, *owner, given, "--set=tune.num_virtual_tokens=90")
    assert code == 2
    assert "90 tokens" in messages(report)[0]


def test_a_provider_checks_prompts_that_came_from_owners(
    run: Path, main: Callable, tmp_path: Path
) -> None:
    without(run, "private_task")
    teacher = tmp_path / "teacher"
    for number, (width, length) in enumerate([(32, 48), (16, 48), (32, 1000)]):
        write_source_prompt(tmp_path / f"prompt{number}", teacher, width, length)
    prompts = [str(tmp_path / f"prompt{number}") for number in range(4)]
    options = ["--set=evaluate.baselines=[]", f"--set=inputs.student={teacher}", TRUST]
    code, report = checked(main, run, *options, f"--set=inputs.source_prompt={prompts[0]}")
    assert code == 0, report
    assert report["stages"] == ["transfer"]
    assert report["label_words"]["student"]["1"] == {"good": "Ġgood"}
    code, report = checked(main, run, *options, f"--set=inputs.source_prompt={prompts}")
    assert code == 2
    found = " ".join(messages(report))
    assert "the prompt has vectors of width 16, the student of width 32" in found
    assert "texts of 1000 tokens do not fit into the context of the target (128)" in found
    assert "prompt3: it cannot be opened: No such file or directory" in found


def test_settings_of_a_baseline_are_checked_before_the_run(
    run: Path, main: Callable, tmp_path: Path
) -> None:
    other = tiny.write_model(tmp_path / "other", "gpt2", vocabulary=500)
    options = [f"--set=inputs.student={other}", TRUST, "--set=transfer.scores=classes"]
    code, report = checked(main, run, *options)
    assert code == 2
    assert len(report["conflicts"]) == 1
    assert "the baseline published transfer: transfer.scores" in messages(report)[0]
    assert set(report["label_words"]) == {"student", "teacher"}, "each has a tokenizer of its own"
    code, report = checked(main, run, *options, "--set=evaluate.baselines=[]")
    assert code == 0, report


def test_each_private_plan_has_its_epsilon(run: Path, main: Callable) -> None:
    privacy = {"enabled": "true", "noise_multiplier": "2", "declared_examples": "150"}
    options = [f"--set=privacy.{key}={value}" for key, value in privacy.items()]
    code, report = checked(main, run, *options, "--set=evaluate.private_rows=[8]")
    assert code == 0, report
    first, second = report["epsilon"]
    assert first["noise_multiplier"] == 2
    assert first["delta"] == pytest.approx(150**-1.1)
    assert 7.9 < second["epsilon"] <= 8
    code, report = checked(main, run, *options, "--set=evaluate.private_rows=[1000000]")
    assert code == 2
    message = "tune: privacy.target_epsilon: 1e+06 is met with a noise multiplier below 0.2"
    assert message in messages(report)[0]
    assert len(report["epsilon"]) == 1, "the other plan is accounted all the same"


def test_a_group_that_suits_distillation_leaves_tuning_alone(run: Path, main: Callable) -> None:
    cluster = ("--set=cluster.tasks_per_node=4", "--set=engine.shard_group=4")
    code, report = checked(main, run, *cluster)
    assert code == 0, report


def test_files_that_are_missing_are_named(run: Path, main: Callable) -> None:
    missing = ("teacher.path", "corpus.path", "private_task.path", "public_task.path")
    code, report = checked(main, run, *(f"--set={field}=./nowhere.csv" for field in missing))
    assert code == 2
    path = run.with_name("nowhere.csv")
    assert messages(report) == [
        f"distill: {path} is not a folder",
        f"distill: corpus.path: {path}: No such file or directory",
        f"tune: private_task.path: {path}: No such file or directory",
        f"transfer: public_task.path: {path}: No such file or directory",
    ]


def test_a_private_public_task_is_refused_unread(run: Path, main: Callable) -> None:
    options = ("--set=public_task.visibility=private", "--set=public_task.path=nowhere.csv")
    code, report = checked(main, run, *options)
    assert code == 2
    assert "transfer: public_task is private" in messages(report)[0]


def test_a_run_file_without_a_stage_is_a_conflict(run: Path, main: Callable) -> None:
    without(run, "teacher", "private_task")
    code, report = checked(main, run)
    assert code == 2
    assert messages(report) == [
        "run file: the run file has no complete set of sections for any stage"
    ]


PRIVATE = (
    "--set=privacy={enabled: true, target_epsilon: 8, declared_examples: 100, "
    "max_total_epsilon: 10, expected_batch_size: 10, steps: 4}",
    "--set=private_task.validation_share=0.1",
)


def spend(run: Path, account: str) -> Path:
    """Write the ledger of the private data, as a run of another account would."""
    config = load_run(run, [each.removeprefix("--set=") for each in PRIVATE], None)
    privacy = config.privacy.model_copy(update={"ledger_anchors": run.parent / account})
    config = config.model_copy(update={"privacy": privacy})
    with lock_ledger(claim_anchor_for(config)) as opened:
        ledger = LedgerRun(opened, "run", private_plan(config), 10.0)
        for step in range(4):
            ledger.intend(0, step, f"{step}")
    return opened.path


def files_of(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_what_the_ledger_refuses_is_a_conflict_and_nothing_is_spent(
    run: Path, main: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(run.parent / "state"))
    code, report = checked(main, run, *PRIVATE)
    assert code == 0, report
    ledger = spend(run, "other")
    before = files_of(run.parent)
    fresh = run.parent / "fresh.jsonl"
    for options, message in (
        ((), "this run would raise the epsilon of the data set to"),
        (("--set=privacy.max_total_epsilon=30",), "but privacy.max_total_epsilon is 30"),
        ((f"--set=privacy.ledger={fresh}",), f"have their privacy ledger at {ledger}, not at"),
        (("--set=privacy.ledger=none/l.jsonl",), f"have their privacy ledger at {ledger}, not at"),
    ):
        code, report = checked(main, run, *PRIVATE, *options)
        assert code == 2
        (found,) = messages(report)
        assert found.startswith("tune: ")
        assert message in found
    assert files_of(run.parent) == before


def test_places_that_cannot_be_written_are_conflicts(run: Path, main: Callable) -> None:
    taken = run.parent / "taken"
    taken.touch()
    for options, message in (
        ((f"--set=output={taken}",), f"distill: cannot write {taken}/tiny: Not a directory"),
        (
            (*PRIVATE, f"--set=privacy.ledger_anchors={taken}/a"),
            f"tune: cannot write the anchors of privacy ledgers to {taken}/a: Not a directory",
        ),
        (
            (*PRIVATE, "--set=privacy.ledger=none/l.jsonl"),
            f"tune: cannot write the privacy ledger {run.parent}/none/l.jsonl: No such file",
        ),
    ):
        code, report = checked(main, run, *options)
        assert code == 2
        (found,) = messages(report)
        assert found.startswith(message), found


def test_a_run_that_may_be_resumed_is_not_compared_with_the_cap(
    run: Path, main: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(run.parent / "state"))
    spend(run, "state/post_dist/ledgers")
    options = [each.removeprefix("--set=") for each in PRIVATE]
    folder = run_folder(load_run(run, options), "tune", {})
    with folder.held():
        pass
    code, report = checked(main, run, *PRIVATE)
    assert code == 0, report
    assert f"tune: the cap, because {folder.path} may be resumed" in report["not_checked"]
    code, report = checked(main, run, *PRIVATE, "--set=seed=1")
    assert code == 2
