"""Prompts in the forms of other software give the answers of `predict`."""

import base64
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import served
import tiny
import torch
from transformers import AutoModelForCausalLM

import post_dist
from post_dist.artifacts.head import LinearHead
from post_dist.artifacts.prompt import read_prompt, write_prompt_files
from post_dist.config.stages import LoraSettings
from post_dist.errors import ArtifactRefused, EnvironmentFault, InputError
from post_dist.models.facts import meta_model
from post_dist.models.load import load_whole, weights_of
from post_dist.models.lora_layers import untrained_lora
from post_dist.serving.completions import Completions
from post_dist.serving.peft_check import check_peft_reads
from post_dist.verify import verify

CPU = torch.device("cpu")
TEXTS = ["the film is lovely", "the plot is dull " * 20]
TASK = replace(
    served.TASK, label_words=(("bad", "awful"), ("good", "great")), class_biases=(0.4, -0.3)
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return served.write_model(tmp_path_factory.mktemp("served") / "model")


def answer_of(model: Any, body: Mapping[str, Any]) -> dict[str, Any]:
    """Answer a request of classes as a vLLM server with processed log-probabilities does."""
    embeddings = torch.load(io.BytesIO(base64.b64decode(body["prompt_embeds"])), weights_only=True)
    with torch.no_grad():
        logits = model(inputs_embeds=embeddings[None]).logits[0, -1]
    for token, bias in body["logit_bias"].items():
        logits[int(token)] += bias
    allowed = body["allowed_token_ids"]
    logprobs = logits[allowed].log_softmax(0).tolist()
    named = {f"token_id:{token}": value for token, value in zip(allowed, logprobs, strict=True)}
    return {"choices": [{"text": "", "logprobs": {"top_logprobs": [named]}}]}


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_request_to_vllm_gets_the_scores_of_predict(
    tmp_path: Path, main: Callable, family: str
) -> None:
    model = served.write_model(tmp_path / "model", family)
    prompt = served.write_prompt(tmp_path / "prompt", model, TASK)
    folder = tmp_path / "served"
    code, _, err = main("export", prompt, "--to=vllm", f"--model={model}", f"--output={folder}")
    assert code == 0, err
    completions = Completions(folder)
    server = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager")
    wanted = post_dist.load_prompt(prompt).predict(TEXTS, model, precision="fp32")
    for text, expected in zip(TEXTS, wanted, strict=True):
        body = json.loads(json.dumps(completions.body(text)))
        assert body["model"] == str(model)
        found = completions.prediction(answer_of(server, body))
        assert found.label == expected.label
        assert found.scores == pytest.approx(expected.scores, abs=1e-5)
    # Without its option, the server gives probabilities over the vocabulary, and leaves biases out.
    answer = answer_of(server, body | {"allowed_token_ids": list(range(600))})
    with pytest.raises(EnvironmentFault, match="over its whole vocabulary"):
        completions.prediction(answer)
    # Both forms in which vLLM reports an error, and an answer without what was asked for.
    refusal = {"message": "Requested sample logprobs of 30, which is greater than max allowed: 20"}
    for wrong, said in (
        ({"error": refusal}, "which is greater than max allowed: 20"),
        (refusal | {"object": "error"}, "which is greater than max allowed: 20"),
        ({"choices": [{"text": "", "logprobs": None}]}, "answers without log-probabilities"),
    ):
        with pytest.raises(EnvironmentFault, match=said):
            completions.prediction(wrong)


def test_peft_loads_model_and_prompt_and_gives_the_same_logits(tmp_path: Path, model: Path) -> None:
    from peft import AutoPeftModelForCausalLM

    prompt = post_dist.load_prompt(served.write_prompt(tmp_path / "prompt", model))
    prompt.export("peft", model, tmp_path / "adapter")
    theirs = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    input_ids = torch.arange(5, 17)[None]
    with torch.no_grad():
        expected = load_whole(model, "fp32", CPU)(
            input_ids, None, prompt.embeddings, torch.tensor([11])
        )
        found = theirs(input_ids=input_ids).logits[:, -1]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_folder_for_the_hub_is_an_artifact_with_a_card(
    tmp_path: Path, model: Path, main: Callable
) -> None:
    from huggingface_hub import ModelCard

    prompt = served.write_prompt(tmp_path / "prompt", model, TASK)
    folder = tmp_path / "hub"
    code, _, err = main("export", prompt, "--to=hub", f"--model={model}", f"--output={folder}")
    assert code == 0, err
    assert verify(folder)["ok"]
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "peft"
    assert "WITHOUT differential privacy" in card.text
    # Nothing of this machine is uploaded.
    for file in folder.iterdir():
        assert str(tmp_path).encode() not in file.read_bytes()
    assert torch.equal(read_prompt(folder).embeddings, read_prompt(prompt).embeddings)


def test_the_card_of_an_export_repeats_the_statement(tmp_path: Path, model: Path) -> None:
    from post_dist.privacy.plan import PrivacyPlan
    from post_dist.privacy.spending import Spending
    from post_dist.privacy.statement import privacy_statement

    prompt = post_dist.load_prompt(served.write_prompt(tmp_path / "prompt", model, TASK))
    taken = {(0, 0): {"a"}}
    said = {"system": "at delta 0.001, for one example.", "seeded": "WITHOUT"}
    for source, words in said.items():
        plan = PrivacyPlan(1.0, 0.2, 1, 1.0, 1e-3, 8.0, noise_source=source)
        claimed = replace(prompt, privacy=privacy_statement(Spending(plan, "", taken)))
        claimed.export("hub", model, tmp_path / source)
        assert words in (tmp_path / source / "README.md").read_text()


def test_a_transferred_prompt_is_refused_on_another_llm_of_its_family(
    tmp_path: Path, model: Path
) -> None:
    other = served.write_model(tmp_path / "other", seed=1)
    parents = {"model": "0" * 64, "source prompt": "1" * 64}
    named = served.write_prompt(
        tmp_path / "named", model, parents=parents | {"target": weights_of(model)}
    )
    prompt = post_dist.load_prompt(named)
    assert prompt.predict(["a"], model)
    with pytest.raises(ArtifactRefused, match="an LLM with other weights"):
        prompt.predict(["a"], other)
    with pytest.raises(ArtifactRefused, match="an LLM with other weights"):
        prompt.export("peft", other, tmp_path / "out")
    # A copy with a file more is the same LLM.
    (model / "notes.txt").write_text("x")
    assert prompt.predict(["a"], model)
    # Version 0.1.0 did not name the LLM.
    older = served.write_prompt(tmp_path / "older", model, parents=parents)
    assert post_dist.load_prompt(older).predict(["a"], other)


def test_what_cannot_be_exported_is_refused(tmp_path: Path, model: Path) -> None:
    head = LinearHead.untrained(torch.randn(9, 32), 2)
    headed = post_dist.load_prompt(served.write_prompt(tmp_path / "headed", model, adapter=head))
    for form in ("vllm", "peft"):
        with pytest.raises(InputError, match="linear head behind it"):
            headed.export(form, model, tmp_path / "out")
    headed.export("hub", model, tmp_path / "hub")
    with pytest.raises(InputError, match="exists already"):
        headed.export("hub", model, tmp_path / "hub")


@pytest.mark.parametrize(
    ("family", "modules", "reason"),
    [
        ("llama", ("q_proj", "down_proj"), None),
        ("deepseek_v3", ("o_proj",), None),
        # PEFT moves these to the experts, so the LoRA of the other layers would be lost.
        ("deepseek_v3", ("down_proj",), "it takes other layers"),
        ("deepseek_v3", ("gate_proj",), "PEFT does not read"),
        ("llama", (), None),
        ("mpt", (), "num_attention_heads"),
    ],
)
def test_what_peft_reads_otherwise_is_no_export(
    tmp_path: Path, family: str, modules: tuple[str, ...], reason: str | None
) -> None:
    folder = tiny.write_model(tmp_path / "model", family)
    model = load_whole(folder, "fp32", CPU)
    adapter = untrained_lora(model, LoraSettings(target_modules=modules), 0) if modules else None
    prompt = replace(
        read_prompt(
            served.write_prompt(tmp_path / "prompt", tiny.write_model(tmp_path / "any", "llama"))
        ),
        embeddings=model.embed(torch.arange(4, 9)),
        adapter=adapter,
    )
    (tmp_path / "adapter").mkdir()
    write_prompt_files(tmp_path / "adapter", prompt, str(folder))
    check = partial(check_peft_reads, tmp_path / "adapter", prompt, meta_model(folder))
    if reason is None:
        check()
    else:
        with pytest.raises(InputError, match=reason):
            check()
