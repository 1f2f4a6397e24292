"""A public warm start, and a head that is tuned behind it: from the student to the table."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
import yaml

from post_dist import load_prompt, load_run
from post_dist.artifacts.prompt import PUBLIC_PROMPT, read_prompt
from post_dist.data.tasks import load_examples
from post_dist.models.load import load_tokenizer, load_whole

WARM_START = """
name: tiny
teacher: {path: teacher}
inputs: {student: student, trust_model: true}
private_task: &task
  name: toy
  visibility: private
  path: private.csv
  template: "Review: {text} It was"
  labels: {0: [bad], 1: [good]}
  max_length: 48
public_task: {<<: *task, visibility: public, path: public.csv}
warm_start: {num_virtual_tokens: 5, steps: 20}
tune: {adapter: head, num_virtual_tokens: 5, steps: 30, batch_size: 40}
transfer: {steps: 4, batch_size: 8, objective: proxy, scores: classes}
engine: {precision: fp32}
privacy: {enabled: true, target_epsilon: 8, declared_examples: 160, ledger_anchors: anchors}
"""


def write_run(folder: Path) -> Path:
    """Write two models whose answers depend on the text, data, and a run file with a head."""
    for name, seed in (("teacher", 0), ("student", 1)):
        tiny.write_model(folder / name, "llama", seed=seed)
        tiny.speak_up(folder / name)
    tiny.write_csv(folder / "private.csv", tiny.sentences(200, 1))
    tiny.write_csv(folder / "public.csv", tiny.sentences(60, 2))
    run = folder / "run.yaml"
    run.write_text(WARM_START)
    return run


def artifact(folder: Path, stage: str) -> Path:
    """Return the one artifact of a stage."""
    (found,) = folder.glob(f"runs/tiny/{stage}-????????/artifact")
    return found


def predicted_accuracy(run: Path, prompt: Path, model: Path) -> float:
    """Return the share of the test texts for which `predict` gives the right class."""
    examples = load_examples(load_run(run).private_task, "test", "private_task")
    found = load_prompt(prompt).predict(examples.texts, model, precision="fp32")
    hits = [each.index == wanted for each, wanted in zip(found, examples.classes, strict=True)]
    return sum(hits) / len(hits)


def test_a_head_behind_a_public_prompt_is_tuned_transferred_and_compared(
    tmp_path: Path, main: Callable
) -> None:
    run = write_run(tmp_path)
    code, out, err = main("pipeline", run, "--json")
    assert code == 0, err
    assert "says nearly the same of all public texts" not in err
    rows = {row["name"]: row for row in json.loads(out)["rows"]}
    # The prompt alone is not what was tuned, so there is no row of direct transfer.
    assert list(rows)[3:] == [
        "DP logistic regression",
        "student + prompt",
        "transferred",
        "proxy-tuning",
    ]
    assert rows["transferred"]["epsilon"] <= 8

    public = read_prompt(artifact(tmp_path, "warm_start"), PUBLIC_PROMPT)
    tuned = read_prompt(artifact(tmp_path, "tune"))
    assert public.privacy is None
    assert not public.adapter.trained
    assert tuned.adapter.trained
    # Only the head has seen private data.
    assert torch.equal(public.embeddings, tuned.embeddings)
    assert torch.equal(public.adapter.mean, tuned.adapter.mean)
    assert tuned.manifest.parents["public prompt"] == public.manifest.digest
    assert read_prompt(artifact(tmp_path, "transfer")).adapter is None
    for stage in ("warm_start", "tune", "transfer"):
        code, out, _ = main("verify", artifact(tmp_path, stage), "--json")
        assert code == 0, out

    # Predictions with a head are those of the table.
    accuracy = predicted_accuracy(run, artifact(tmp_path, "tune"), tmp_path / "student")
    assert accuracy == rows["student + prompt"]["accuracy_micro"]

    # Without privacy, the same head learns the task.
    sets = ["privacy.enabled=false", "evaluate.split=train", "tune.steps=300"]
    code, out, err = main("pipeline", run, "--json", *(f"--set={each}" for each in sets))
    assert code == 0, err
    rows = {row["name"]: row["accuracy_micro"] for row in json.loads(out)["rows"]}
    assert rows["student + prompt"] > 0.75


def test_each_stage_finds_the_student_that_an_earlier_command_has_made(
    tmp_path: Path, main: Callable
) -> None:
    run = write_run(tmp_path)
    fields = yaml.safe_load(run.read_text())
    del fields["inputs"]
    fields["student"] = {"layers": "first_last", "num_layers": 2}
    fields["corpus"] = {"path": "public.csv", "sequence_length": 16, "held_out_sequences": 4}
    fields["distill"] = {"steps": 2, "batch_size": 4}
    for section in ("warm_start", "tune", "transfer"):
        fields[section]["steps"] = 2
    run.write_text(yaml.safe_dump(fields))
    for command in ("distill", "warm-start", "tune", "transfer", "evaluate"):
        code, _, err = main(command, run)
        assert code == 0, f"{command}: {err}"


def test_a_prompt_that_private_data_have_touched_starts_no_tuning(
    tmp_path: Path, main: Callable
) -> None:
    run = write_run(tmp_path)
    plain = ("--set=privacy.enabled=false", "--set=tune.steps=2")
    assert main("warm-start", run)[0] == 0
    assert main("tune", run, *plain)[0] == 0
    tuned = artifact(tmp_path, "tune")
    given = f"--set=inputs.public_prompt={tuned}"
    code, _, err = main("tune", run, given)
    assert code == 4
    assert "is a soft prompt, not a public prompt" in err
    code, out, _ = main("check", run, given)
    assert code == 2
    assert "is a soft prompt, not a public prompt" in out


def test_a_head_of_more_layers_than_the_student_has_is_refused(
    tmp_path: Path, main: Callable
) -> None:
    run = write_run(tmp_path)
    assert main("warm-start", run, "--set=warm_start.head_layers=3")[0] == 0
    public = artifact(tmp_path, "warm_start")
    # A student of fewer layers has the width and the tokenizer of this one.
    tiny.write_model(tmp_path / "student", "llama", layers=2)
    code, _, err = main("tune", run, f"--set=inputs.public_prompt={public}")
    assert code == 4
    assert "the head needs 3 layers, but the student has 2" in err


def test_an_owner_alone_tunes_a_head_behind_a_prompt_that_says_nothing(
    tmp_path: Path, main: Callable
) -> None:
    run = write_run(tmp_path)
    settings = yaml.safe_load(run.read_text())
    for section in ("teacher", "public_task", "warm_start", "transfer"):
        del settings[section]
    run.write_text(yaml.safe_dump(settings))
    plain = ("--set=privacy.enabled=false", "--set=evaluate.split=train")
    assert main("check", run, *plain)[0] == 0
    rows = {}
    for rate in (1e-9, 4):
        assert main("tune", run, *plain, f"--set=tune.learning_rate={rate}")[0] == 0
        code, out, err = main("evaluate", run, *plain, f"--set=tune.learning_rate={rate}", "--json")
        assert code == 0, err
        table = {row["name"]: row for row in json.loads(out)["rows"]}
        rows[rate] = table["student + prompt"]["accuracy_micro"]
    assert rows[4] > rows[1e-9] + 0.1, "the head learns what the words do not say"

    # The private one, behind the same prompt.
    assert main("tune", run)[0] == 0
    heads = [read_prompt(path) for path in tmp_path.glob("runs/tiny/tune-????????/artifact")]
    private = next(head for head in heads if head.privacy is not None)
    assert private.adapter.depth(32) == 4
    for head in heads:
        # Mean and scale come from the student alone, and from no private text.
        assert torch.equal(head.adapter.mean, private.adapter.mean)
        assert torch.equal(head.adapter.scale, private.adapter.scale)
        assert torch.equal(head.embeddings, private.embeddings)
    vectors = private.embeddings
    assert len(vectors) == 5
    assert torch.equal(vectors, vectors[:1].expand(5, -1)), "one token, which ends a text"
    model = load_whole(tmp_path / "student", "fp32", torch.device("cpu"))
    end = load_tokenizer(tmp_path / "student").eos_token_id
    assert torch.equal(vectors[0], model.embed(torch.tensor([end]))[0].detach())


def test_a_masked_model_needs_a_public_prompt_for_a_head(tmp_path: Path, main: Callable) -> None:
    run = tiny.write_run(tmp_path, "roberta")
    options = (
        "--set=tune={adapter: head, num_virtual_tokens: 5}",
        "--set=transfer.scores=classes",
        "--set=evaluate.baselines=[]",
        "--set=inputs.student=teacher",
        "--set=inputs.trust_model=true",
    )
    for command in ("check", "tune"):
        code, out, err = main(command, run, *options)
        assert code == 2, out + err
        assert "a masked model writes no texts" in " ".join((out + err).split())


def test_check_lists_what_the_stages_refuse_of_a_start_and_a_head(
    tmp_path: Path, main: Callable
) -> None:
    run = write_run(tmp_path)
    assert main("warm-start", run)[0] == 0
    public = artifact(tmp_path, "warm_start")
    other = (f"--set=inputs.public_prompt={public}", "--set=warm_start=null")
    code, out, _ = main("check", run, *other, "--set=tune.num_virtual_tokens=7")
    assert code == 2
    assert "the public prompt has 5" in out
    assert main("check", run, *other)[0] == 0

    # A provider gets a prompt with a head, and has no private task.
    assert main("tune", run)[0] == 0
    provider = tmp_path / "provider.yaml"
    settings = yaml.safe_load(run.read_text())
    for section in ("private_task", "privacy", "tune", "warm_start"):
        del settings[section]
    settings["inputs"]["source_prompt"] = str(artifact(tmp_path, "tune"))
    settings["transfer"] = {"steps": 1, "scores": "vocabulary"}
    provider.write_text(yaml.safe_dump(settings))
    code, out, _ = main("check", provider)
    assert code == 2
    assert "the source prompt has a head" in out
    code, _, err = main("transfer", provider)
    assert code == 2
    assert "the source prompt has a head" in err


def test_a_warm_start_that_says_the_same_of_all_texts_is_not_taken(
    tmp_path: Path, main: Callable
) -> None:
    run = write_run(tmp_path)
    # A random model with small weights answers alike whatever it reads.
    tiny.write_model(tmp_path / "teacher", "llama")
    prompts = []
    for steps in (1, 20):
        code, out, err = main("warm-start", run, "--json", f"--set=warm_start.steps={steps}")
        assert code == 0, err
        assert "the prompt stays as it was initialized" in err
        assert json.loads(out)["stage"] == "warm-start"
        prompts.append(read_prompt(Path(json.loads(out)["artifact"]), PUBLIC_PROMPT))
    assert prompts[0].manifest.config["public_text"]["useful"] is False
    assert torch.equal(prompts[0].embeddings, prompts[1].embeddings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["warm_start.num_virtual_tokens=7"], "is not tune.num_virtual_tokens (5)"),
        (["transfer.scores=vocabulary"], "set transfer.scores: classes"),
        (["tune.class_bias=true"], "a head needs no other biases"),
        (["evaluate.baselines=[published transfer]"], "remove evaluate.baselines"),
        (["public_task.labels={}"], "public_task has no template or no labels"),
        (["warm_start.class_shares=[0.2, 0.3, 0.5]"], "3 shares for 2 classes"),
    ],
)
def test_settings_that_do_not_suit_a_head_are_refused(
    tmp_path: Path, main: Callable, settings: list[str], message: str
) -> None:
    run = write_run(tmp_path)
    code, _, err = main("pipeline", run, *(f"--set={each}" for each in settings))
    assert code == 2, err
    assert message in err
