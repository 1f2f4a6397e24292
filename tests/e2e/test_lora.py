"""A LoRA that is tuned on the student: from the run file to the table, and to PEFT."""

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
from post_dist.stages.prompt_origin import check_belongs

LORA = (
    "tune={adapter: lora, num_virtual_tokens: 5, steps: 12, batch_size: 40, learning_rate: 0.01, "
    "lora: {r: 2, upper_layers: 2}}"
)


def write_lora_run(folder: Path) -> Path:
    """Write the run of the head with a LoRA in its place."""
    run = write_run(folder)
    text = run.read_text()
    (line,) = (line for line in text.splitlines() if line.startswith("tune:"))
    run.write_text(text.replace(line, LORA.replace("=", ": ", 1)))
    return run


def test_a_lora_is_tuned_transferred_and_compared(tmp_path: Path, main: Callable) -> None:
    run = write_lora_run(tmp_path)
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
    assert tuned.adapter.rank == 2
    assert [layer.split(".", 3)[2] for layer in tuned.adapter.layers] == ["2", "2", "3", "3"]
    assert all(factor.any() for factor in tuned.adapter.factors.values())
    # Only the LoRA has seen private data.
    public = artifact(tmp_path, "warm_start")
    assert torch.equal(tuned.embeddings, read_prompt(public, "public prompt").embeddings)
    assert read_prompt(artifact(tmp_path, "transfer")).adapter is None
    for stage in ("tune", "transfer"):
        code, out, _ = main("verify", artifact(tmp_path, stage), "--json")
        assert code == 0, out

    # The page shows the size of a prompt.
    assert main("report", tmp_path / "runs/tiny")[0] == 0
    page = next(tmp_path.rglob("report.html")).read_text()
    assert "<b>5×32</b>prompt vectors" in page

    # Predictions with a LoRA are those of the table.
    accuracy = predicted_accuracy(run, artifact(tmp_path, "tune"), tmp_path / "student")
    assert accuracy == rows["student + prompt"]["accuracy_micro"]


def test_a_lora_learns_the_task_without_privacy_and_without_a_public_prompt(
    tmp_path: Path, main: Callable
) -> None:
    run = write_lora_run(tmp_path)
    sets = [
        "privacy.enabled=false",
        "warm_start=null",
        "evaluate.split=train",
        "tune.steps=60",
        "tune.batch_size=16",
        "transfer.scores=vocabulary",
    ]
    code, out, err = main("pipeline", run, "--json", *(f"--set={each}" for each in sets))
    assert code == 0, err
    rows = {row["name"]: row["accuracy_micro"] for row in json.loads(out)["rows"]}
    assert rows["student + prompt"] > 0.75
    # The scores of the transferred prompt follow those of the student, which is another model.
    assert "transferred" in rows


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "roberta"])
def test_peft_gives_the_same_scores(tmp_path: Path, family: str) -> None:
    from peft import PeftModel
    from served import TASK, write_model, write_prompt

    from post_dist.artifacts.lora import Lora
    from post_dist.config.stages import LoraSettings
    from post_dist.data.task_reader import TaskReader
    from post_dist.models.answers import answers_of
    from post_dist.models.batch_inference import InferenceRun
    from post_dist.models.lora_layers import chosen_shapes
    from post_dist.runtime.distributed import single_process

    folder = write_model(tmp_path / "model", family)
    targets = ("query", "output.dense") if family == "roberta" else ("v_proj", "down_proj")
    settings = LoraSettings(r=3, lora_alpha=5, target_modules=targets, upper_layers=3)
    lora = Lora.untrained(chosen_shapes(read_facts(folder).linears, settings), settings, seed=0)
    lora = lora.with_values([torch.randn(factor.shape) for factor in lora.factors.values()])
    template = "{text} It was {mask}." if family == "roberta" else TASK.template
    task = replace(TASK, template=template)
    made = read_prompt(write_prompt(tmp_path / "lora", folder, task, lora))

    model = load_whole(folder, "fp32", torch.device("cpu"))
    reader = TaskReader(
        task, load_tokenizer(folder), masked=model.masked, vocabulary=model.vocabulary_size
    )
    examples = reader.encode([text for text, _ in tiny.sentences(5, 1)])
    run = InferenceRun(2, single_process(), "test")
    ours = answers_of(model, examples, reader, made, run)
    plain = answers_of(model, examples, reader, replace(made, adapter=None), run)
    assert (ours - plain).abs().max() > 0.1

    batch = reader.collate(examples)
    embedded = model.embed(batch.input_ids)
    prompt = made.embeddings.expand(len(examples), -1, -1)
    mask = torch.cat([torch.ones(5, 5, dtype=torch.long), batch.attention_mask], dim=1)
    theirs = PeftModel.from_pretrained(model.model, str(tmp_path / "lora"))
    logits = theirs(inputs_embeds=torch.cat([prompt, embedded], dim=1), attention_mask=mask).logits
    expected = reader.scores(logits[torch.arange(5), batch.answer + 5])
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_a_lora_that_peft_has_made_is_read(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from served import write_model, write_prompt

    from post_dist.admission.door import admit_prompt
    from post_dist.artifacts.lora_files import read_lora

    folder = write_model(tmp_path / "model")
    model = load_whole(folder, "fp32", torch.device("cpu")).model
    config = LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=True
    )
    made = tmp_path / "made"
    get_peft_model(model, config).save_pretrained(made)
    lora = read_lora(made / "adapter_model.safetensors", made / "adapter_config.json")
    assert lora.rank == 4
    assert lora.alpha == 8
    assert len(lora.layers) == 8
    # It has no task, no privacy statement and no manifest, so the door does not take it.
    with pytest.raises(ArtifactRefused, match="it is not a post_dist artifact: it has no"):
        admit_prompt(made)
    written = admit_prompt(write_prompt(tmp_path / "ours", folder, adapter=lora))
    assert written.adapter.layers == lora.layers
    assert all(map(torch.equal, written.adapter.factors.values(), lora.factors.values()))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["tune.lora.target_modules=[c_attn]"], "choose from down_proj, gate_proj, k_proj"),
        (["tune.lora.upper_layers=9"], "and the model has 4 layers"),
        (["tune.class_bias=true"], "a lora needs no other biases"),
        (["tune.adapter=prompt"], "holds the settings of adapter: lora"),
        (["evaluate.baselines=[published transfer]"], "remove evaluate.baselines"),
        (["tune.num_virtual_tokens=7"], "is not tune.num_virtual_tokens (7)"),
    ],
)
def test_settings_that_do_not_suit_a_lora_are_refused(
    tmp_path: Path, main: Callable, settings: list[str], message: str
) -> None:
    run = write_lora_run(tmp_path)
    sets = [f"--set={each}" for each in settings]
    code, _, err = main("pipeline", run, *sets)
    assert code == 2, err
    assert message in err
    code, out, err = main("check", run, *sets)
    assert code == 2
    assert message in out + err


def test_a_lora_is_not_used_on_another_model_or_by_other_software(
    tmp_path: Path, main: Callable
) -> None:
    run = write_lora_run(tmp_path)
    plain = ("privacy.enabled=false", "warm_start=null", "tune.steps=1")
    assert main("tune", run, *(f"--set={each}" for each in plain))[0] == 0
    tuned = artifact(tmp_path, "tune")
    student = tmp_path / "student"
    out = tmp_path / "out"
    code, _, err = main("export", tuned, "--to=vllm", f"--model={student}", f"--output={out}")
    assert code == 2
    assert "has a LoRA behind it, which vllm does not run" in err
    code, _, err = main("export", tuned, "--to=peft", f"--model={student}", f"--output={out}")
    assert code == 0, err
    assert {path.name for path in out.iterdir()} >= {"prompt.safetensors", "adapter_config.json"}

    # A student of fewer layers has the width and the tokenizer of this one.
    tiny.write_model(tmp_path / "small", "llama", layers=2)
    small = read_facts(tmp_path / "small")
    tokenizer = load_tokenizer(tmp_path / "small")
    with pytest.raises(ArtifactRefused, match=r"changes model.layers.2.self_attn.q_proj, which"):
        check_belongs(read_prompt(tuned), small, tokenizer)
