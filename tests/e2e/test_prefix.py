"""A prefix that is tuned on the student: from the run file to the table, and to PEFT."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from e2e.test_head import artifact, predicted_accuracy, write_run

from post_dist.artifacts.prompt import read_prompt
from post_dist.errors import ArtifactRefused
from post_dist.models.facts import read_facts
from post_dist.models.load import load_tokenizer, load_whole
from post_dist.models.prefix_layers import initial_prefix
from post_dist.report.lineage import lineage
from post_dist.report.page import _use
from post_dist.stages.prompt_origin import check_belongs

PREFIX = (
    "tune: {adapter: prefix, num_virtual_tokens: 5, steps: 12, batch_size: 40, learning_rate: 0.01}"
)


def write_prefix_run(folder: Path) -> Path:
    """Write the run of the head with a prefix in its place."""
    run = write_run(folder)
    text = run.read_text()
    (line,) = (line for line in text.splitlines() if line.startswith("tune:"))
    run.write_text(text.replace(line, PREFIX))
    return run


def test_a_prefix_is_tuned_transferred_and_compared(tmp_path: Path, main: Callable) -> None:
    run = write_prefix_run(tmp_path)
    assert main("check", run)[0] == 0
    code, out, err = main("pipeline", run, "--json")
    assert code == 0, err
    rows = {row["name"]: row for row in json.loads(out)["rows"]}
    # The prompt alone is not what was tuned, so there is no row of direct transfer.
    assert list(rows)[3:] == [
        "DP logistic regression",
        "student + prompt",
        "transferred",
        "proxy-tuning",
    ]
    assert rows["transferred"]["epsilon"] <= 8
    assert rows["student + prompt"]["epsilon"] <= 8

    tuned = read_prompt(artifact(tmp_path, "tune"))
    # Only the prefix has seen private data.
    public = read_prompt(artifact(tmp_path, "warm_start"), "public prompt")
    assert torch.equal(tuned.embeddings, public.embeddings)
    student = load_whole(tmp_path / "student", "fp32", torch.device("cpu"))
    start = initial_prefix(student, public.embeddings)
    assert tuned.adapter.shape == start.shape
    for one, other in zip(tuned.adapter.keys_and_values, start.keys_and_values, strict=True):
        # A step of Adam moves a value by about its rate.
        assert 0 < (one - other).abs().max() < 12 * 0.01 * 1.5
    assert read_prompt(artifact(tmp_path, "transfer")).adapter is None
    for stage in ("tune", "transfer"):
        code, out, _ = main("verify", artifact(tmp_path, stage), "--json")
        assert code == 0, out

    # The page counts the tokens of the prefix, which PEFT runs alone.
    assert main("report", tmp_path / "runs/tiny")[0] == 0
    page = next(tmp_path.rglob("report.html")).read_text()
    assert "prefix, 5 prompt vectors, " in page
    (evaluation,) = tmp_path.glob("runs/tiny/evaluate-????????")
    use = _use("student + prompt", lineage(evaluation))
    assert use["alone"]
    assert (use["size"], use["unit"]) == ("5", "virtual tokens in every layer")

    # Predictions with a prefix are those of the table.
    accuracy = predicted_accuracy(run, artifact(tmp_path, "tune"), tmp_path / "student")
    assert accuracy == rows["student + prompt"]["accuracy_micro"]


def test_a_prefix_learns_the_task_without_privacy_and_without_a_public_prompt(
    tmp_path: Path, main: Callable
) -> None:
    run = write_prefix_run(tmp_path)
    sets = [
        "privacy.enabled=false",
        "warm_start=null",
        "evaluate.split=train",
        "tune.steps=60",
        "tune.batch_size=16",
        "tune.learning_rate=0.05",
        "transfer.scores=vocabulary",
    ]
    code, out, err = main("pipeline", run, "--json", *(f"--set={each}" for each in sets))
    assert code == 0, err
    rows = {row["name"]: row["accuracy_micro"] for row in json.loads(out)["rows"]}
    assert rows["student + prompt"] > 0.75
    # The scores of the transferred prompt follow those of the student, which is another model.
    assert "transferred" in rows


def test_a_search_over_prefixes_scores_its_trials(tmp_path: Path, main: Callable) -> None:
    run = write_prefix_run(tmp_path)
    sets = (
        "tune.search={mean_trials: 1.5, learning_rate: [0.01, 0.001]}",
        "tune.steps=2",
        "warm_start=null",
    )
    code, _, err = main("tune", run, *(f"--set={each}" for each in sets))
    assert code == 0, err
    assert read_prompt(artifact(tmp_path, "tune")).adapter is not None


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mpt"])
def test_peft_gives_the_same_scores(tmp_path: Path, family: str) -> None:
    """Llama and Gemma have fewer heads of keys than of queries."""
    from peft import PeftModel
    from served import TASK, write_model, write_prompt

    from post_dist.data.task_reader import TaskReader
    from post_dist.models.answers import answers_of
    from post_dist.models.batch_inference import InferenceRun
    from post_dist.runtime.distributed import single_process

    folder = write_model(tmp_path / "model", family)
    model = load_whole(folder, "fp32", torch.device("cpu"))
    start_nd = torch.randn(5, 32)
    start = initial_prefix(model, start_nd)
    parts = [part + 0.3 * torch.randn_like(part) for part in start.keys_and_values]
    made = read_prompt(write_prompt(tmp_path / "prefix", folder, adapter=start.with_values(parts)))
    reader = TaskReader(
        TASK, load_tokenizer(folder), masked=False, vocabulary=model.vocabulary_size
    )
    examples = reader.encode([text for text, _ in tiny.sentences(5, 1)])
    run = InferenceRun(2, single_process(), "test")

    # The prefix that a prompt starts with says what the prompt says.
    prompt = replace(made, embeddings=start_nd, adapter=None)
    of_prompt = answers_of(model, examples, reader, prompt, run)
    of_start = answers_of(model, examples, reader, replace(prompt, adapter=start), run)
    torch.testing.assert_close(of_start, of_prompt, rtol=1e-4, atol=1e-5)
    # Whatever prompt it started from, a tuned one runs alone.
    ours = answers_of(model, examples, reader, made, run)
    assert (ours - of_prompt).abs().max() > 0.1
    other = replace(made, embeddings=torch.randn(5, 32))
    assert torch.equal(answers_of(model, examples, reader, other, run), ours)

    batch = reader.collate(examples)
    theirs = PeftModel.from_pretrained(model.model, str(tmp_path / "prefix"))
    logits = theirs(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    expected = reader.scores(logits[torch.arange(5), batch.answer])
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_a_prefix_that_peft_has_made_is_read(tmp_path: Path) -> None:
    from peft import PrefixTuningConfig, get_peft_model
    from served import write_model, write_prompt

    from post_dist.admission.door import admit_prompt
    from post_dist.artifacts.prefix import PrefixShape
    from post_dist.artifacts.prefix_files import read_prefix

    folder = write_model(tmp_path / "model")
    model = load_whole(folder, "fp32", torch.device("cpu")).model
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    made = tmp_path / "made"
    get_peft_model(model, config).save_pretrained(made)
    prefix = read_prefix(made / "adapter_model.safetensors", made / "adapter_config.json", 5)
    assert prefix.shape == PrefixShape(layers=4, heads=2, width=8)
    # It has no task, no privacy statement and no manifest, so the door does not take it.
    with pytest.raises(ArtifactRefused, match="it is not a post_dist artifact: it has no"):
        admit_prompt(made)
    written = admit_prompt(write_prompt(tmp_path / "ours", folder, adapter=prefix))
    parts = zip(written.adapter.keys_and_values, prefix.keys_and_values, strict=True)
    assert all(torch.equal(one, other) for one, other in parts)


@pytest.mark.parametrize("family", ["llama", "mpt", "mixtral"])
def test_responses_behind_a_prefix_are_those_behind_its_prompt(tmp_path: Path, family: str) -> None:
    """MPT and Mixtral count the positions of padding, so there must be none in the middle."""
    from served import TASK, write_model

    from post_dist.artifacts.prompt import PromptContents
    from post_dist.data.task_reader import TaskReader
    from post_dist.models.answers import answers_of
    from post_dist.models.batch_inference import InferenceRun
    from post_dist.runtime.distributed import single_process

    folder = write_model(tmp_path / "model", family)
    model = load_whole(folder, "fp32", torch.device("cpu"))
    task = replace(TASK, label_words=(), label_names=(), max_response_length=6)
    reader = TaskReader(
        task, load_tokenizer(folder), masked=False, vocabulary=model.vocabulary_size
    )
    texts = [text for text, _ in tiny.sentences(6, 1)]
    examples = reader.encode([*texts, "x"])
    run = InferenceRun(4, single_process(), "test")
    prompt = PromptContents(torch.randn(5, 32), task, None)
    # Vectors of another prompt stand beside it. They must not run.
    started = initial_prefix(model, prompt.embeddings)
    prefix = replace(prompt, embeddings=torch.randn(5, 32), adapter=started)
    expected = answers_of(model, examples, reader, prompt, run)
    assert not torch.equal(answers_of(model, examples, reader, None, run), expected)
    assert torch.equal(answers_of(model, examples, reader, prefix, run), expected)


@pytest.mark.parametrize("family", ["roberta", "deepseek_v3"])
def test_a_student_that_keeps_other_keys_and_values_is_refused(
    tmp_path: Path, main: Callable, family: str
) -> None:
    run = tiny.write_run(tmp_path, family)
    (tmp_path / "private.csv").write_text("no columns of this task\n")
    sets = ("--set=tune.adapter=prefix", "--set=evaluate.baselines=[]")
    student = f"--set=inputs.student={tmp_path / 'teacher'}"
    code, _, err = main("tune", run, student, "--trust-model", *sets)
    assert code == 2
    assert "tune.adapter: prefix" in err
    assert "set tune.adapter to prompt, head or lora" in err
    assert "column" not in err, "the data were read first"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["tune.class_bias=true"], "a prefix needs no other biases"),
        (["tune.lora={r: 2}"], "holds the settings of adapter: lora"),
        (["transfer.adapter=prefix"], "'prompt', 'head' or 'lora'"),
        (["evaluate.baselines=[published transfer]"], "remove evaluate.baselines"),
        (["tune.num_virtual_tokens=7"], "is not tune.num_virtual_tokens (7)"),
    ],
)
def test_settings_that_do_not_suit_a_prefix_are_refused(
    tmp_path: Path, main: Callable, settings: list[str], message: str
) -> None:
    run = write_prefix_run(tmp_path)
    sets = [f"--set={each}" for each in settings]
    code, _, err = main("pipeline", run, *sets)
    assert code == 2, err
    assert message in err
    code, out, err = main("check", run, *sets)
    assert code == 2
    assert message in out + err


def test_a_prefix_is_not_used_on_another_model_or_by_vllm(tmp_path: Path, main: Callable) -> None:
    run = write_prefix_run(tmp_path)
    plain = ("privacy.enabled=false", "warm_start=null", "tune.steps=1")
    assert main("tune", run, *(f"--set={each}" for each in plain))[0] == 0
    tuned = artifact(tmp_path, "tune")
    student = tmp_path / "student"
    out = tmp_path / "out"
    code, _, err = main("export", tuned, "--to=vllm", f"--model={student}", f"--output={out}")
    assert code == 2
    assert "has a prefix in its place, which vllm does not run" in err
    code, _, err = main("export", tuned, "--to=peft", f"--model={student}", f"--output={out}")
    assert code == 0, err
    assert {path.name for path in out.iterdir()} >= {"prompt.safetensors", "adapter_config.json"}

    # A student of fewer layers has the width and the tokenizer of this one.
    tiny.write_model(tmp_path / "small", "llama", layers=2)
    small = read_facts(tmp_path / "small")
    tokenizer = load_tokenizer(tmp_path / "small")
    message = r"holds 2 keys of width 8 for each token in 4 layers, which does not fit the student"
    with pytest.raises(ArtifactRefused, match=message):
        check_belongs(read_prompt(tuned), small, tokenizer)
