"""Models and tokenizers as strangers bring them: used as transformers uses them, or refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from tokenizers import processors

from post_dist.config.load import load_run
from post_dist.conflicts import Layout
from post_dist.data.template import Template
from post_dist.errors import InputError
from post_dist.models.batch_inference import InferenceRun
from post_dist.models.facts import meta_from_config, read_facts
from post_dist.models.families import context_length
from post_dist.models.generation import generate_responses, generation_conflicts
from post_dist.models.load import load_tokenizer, load_whole
from post_dist.models.student import check_cut, least_harmful_layers, write_student
from post_dist.privacy.gradients import sharing_is_faster
from post_dist.runtime.distributed import World
from post_dist.stages.check.run import check_run
from post_dist.stages.distill.conflicts import conflicts
from post_dist.stages.distill.stage import check_distillation

CPU = torch.device("cpu")
TOKENS = {"vocab_size": 600, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = TOKENS | {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
}

BART = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
}


def write(folder: Path, config: Any, model_class: str = "AutoModelForCausalLM") -> Path:
    """Write a random model of a configuration with a tokenizer."""
    torch.manual_seed(0)
    model = getattr(transformers, model_class)
    make = model.from_config if model_class.startswith("Auto") else model
    made = make(config)
    made.save_pretrained(folder)
    tiny.tokenizer("llama").save_pretrained(folder)
    tiny.speak_up(folder)
    return folder


def change_config(folder: Path, **fields: object) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return folder


def test_the_answer_comes_before_the_tokens_that_end_a_text(tmp_path: Path) -> None:
    words = tiny.tokenizer("llama")
    words._tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    text = "Review: {text} It was"
    ends = Template(text, words, 48, masked=False, vocabulary=600, max_response_length=4)
    [row] = ends.encode(["the film is dull"])
    expected = words("Review: the film is dull It was", add_special_tokens=False).input_ids
    assert row.token_ids == [1, *expected]
    assert row.answer == len(expected)
    assert 2 not in ends.first_tokens()
    [with_response] = ends.encode(["the film is dull"], ["good"])
    assert with_response.token_ids[: len(expected) + 1] == [1, *expected]
    assert with_response.response[-1] == 2


def test_padding_is_a_token_with_an_embedding() -> None:
    words = tiny.tokenizer("llama")
    words.add_special_tokens({"pad_token": "[PAD]"})
    assert words.pad_token_id >= 600 or words.pad_token_id == len(words) - 1
    known = words.pad_token_id
    template = Template("{text} It was", words, 48, masked=False, vocabulary=known)
    rows = template.encode(["the film is dull", "dull"])
    assert int(template.collate(rows).input_ids.max()) < known


def test_a_response_needs_an_end_with_an_embedding() -> None:
    words = tiny.tokenizer("llama")
    words.add_special_tokens({"eos_token": "[END]"})
    known = words.eos_token_id
    with pytest.raises(InputError, match="no end-of-text token"):
        Template("{text} It was", words, 48, masked=False, vocabulary=known, max_response_length=4)


@pytest.mark.parametrize("beyond", [False, True])
def test_a_masked_model_needs_a_mask_with_an_embedding(*, beyond: bool) -> None:
    words = tiny.tokenizer("roberta" if beyond else "llama")
    vocabulary = words.mask_token_id if beyond else 600
    with pytest.raises(InputError, match="no mask token"):
        Template("{text} It was {mask}", words, 48, masked=True, vocabulary=vocabulary)


@pytest.mark.parametrize("architectures", [None, ["BertForPreTraining"]])
def test_an_encoder_without_a_causal_class_is_masked(
    tmp_path: Path, architectures: list[str] | None
) -> None:
    config = transformers.BertConfig(**SIZES)
    folder = write(tmp_path / "bert", config, "BertForMaskedLM")
    change_config(folder, architectures=architectures)
    assert load_whole(folder, "fp32", CPU).masked
    assert read_facts(folder).masked


def test_a_model_that_is_causal_by_its_class_alone_is_refused(tmp_path: Path) -> None:
    config = transformers.BertConfig(**SIZES)
    folder = write(tmp_path / "bert", config, "BertLMHeadModel")
    for read in (read_facts, lambda each: load_whole(each, "fp32", CPU)):
        with pytest.raises(InputError, match="not causal"):
            read(folder)
    change_config(folder, is_decoder=True)
    assert not load_whole(folder, "fp32", CPU).masked


def test_an_attention_to_later_tokens_is_found_by_running_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever its configuration says."""
    folder = tiny.write_model(tmp_path / "model", "llama")
    tiny.speak_up(folder)
    load_whole(folder, "fp32", CPU)
    forward = transformers.LlamaModel.forward

    def with_a_look_ahead(self: Any, *args: Any, **kwargs: Any) -> Any:
        outputs = forward(self, *args, **kwargs)
        outputs.last_hidden_state += outputs.last_hidden_state.mean(dim=1, keepdim=True)
        return outputs

    monkeypatch.setattr(transformers.LlamaModel, "forward", with_a_look_ahead)
    with pytest.raises(InputError, match="not causal"):
        load_whole(folder, "fp32", CPU)


RECURRENT = {
    "rwkv": lambda: transformers.RwkvConfig(**TOKENS, hidden_size=32, num_hidden_layers=4),
    "lfm2": lambda: transformers.Lfm2Config(
        **SIZES, num_key_value_heads=2, layer_types=["conv", "full_attention"] * 2
    ),
}


@pytest.mark.parametrize("family", RECURRENT)
def test_a_prompt_of_a_recurrent_model_stays_a_prompt(tmp_path: Path, family: str) -> None:
    """Its keys and values do not say what the prompt says."""
    folder = write(tmp_path / family, RECURRENT[family]())
    model = load_whole(folder, "fp32", CPU)
    assert not model.keeps_prefix
    assert not sharing_is_faster(model, 40)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_attention_keeps_a_prefix(tmp_path: Path, family: str) -> None:
    model = load_whole(tiny.write_model(tmp_path / "model", family), "fp32", CPU)
    assert model.keeps_prefix == (not model.masked)
    assert sharing_is_faster(model, 40) == (not model.masked)


def test_gradients_of_a_family_that_pytorch_cannot_batch(tmp_path: Path) -> None:
    """BLOOM's activation has a backward pass of its own."""
    config = transformers.BloomConfig(**TOKENS, hidden_size=32, n_layer=2, n_head=4)
    folder = write(tmp_path / "bloom", config)
    model = load_whole(folder, "fp32", CPU)
    assert model.keeps_prefix
    assert not model.differentiates_prefix
    assert not sharing_is_faster(model, 40)


ROTARY = {
    "longrope": {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4},
    "dynamic": {"factor": 4.0},
}


@pytest.mark.parametrize("kind", ROTARY)
def test_frequencies_that_depend_on_the_length_limit_the_context(kind: str) -> None:
    rotary = {"rope_type": kind, "rope_theta": 1e4, **ROTARY[kind]}
    rotary["original_max_position_embeddings"] = 32
    family = transformers.Phi3Config if kind == "longrope" else transformers.LlamaConfig
    limited = family(**SIZES, rope_parameters=rotary, original_max_position_embeddings=32)
    assert context_length(limited) == 32
    assert context_length(family(**SIZES)) == 128


def test_two_widths_are_refused(tmp_path: Path) -> None:
    sizes = {name: size for name, size in SIZES.items() if name != "intermediate_size"}
    config = transformers.OPTConfig(**sizes, ffn_dim=64, word_embed_proj_dim=16)
    folder = write(tmp_path / "opt", config)
    for read in (read_facts, lambda each: load_whole(each, "fp32", CPU)):
        with pytest.raises(InputError, match="width 16, and the hidden states 32"):
            read(folder)


def test_a_model_that_cannot_run_in_a_precision_is_refused(tmp_path: Path) -> None:
    config = transformers.MambaConfig(**TOKENS, hidden_size=32, num_hidden_layers=2, state_size=8)
    folder = write(tmp_path / "mamba", config)
    with pytest.raises(InputError, match="does not run"):
        load_whole(folder, "bf16", CPU)


def test_an_encoder_with_a_decoder_is_refused(tmp_path: Path) -> None:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    config = transformers.T5Config(vocab_size=600, pad_token_id=0, **sizes)
    config.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="not a causal or masked language model"):
        read_facts(tmp_path)
    folder = write(tmp_path / "bart", transformers.BartConfig(vocab_size=600, **BART), "BartModel")
    with pytest.raises(InputError, match="not a causal or masked language model"):
        load_whole(folder, "fp32", CPU)


def test_a_part_of_a_larger_model_is_no_teacher(tmp_path: Path) -> None:
    run = tiny.write_run(tmp_path)
    text = {**SIZES, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 16}
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config=text,
        vision_config=vision | {"intermediate_size": 16, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
    )
    config.save_pretrained(tmp_path / "images")
    facts = read_facts(tmp_path / "images")
    found = conflicts(load_run(run), facts, Layout())
    assert ["a part of a larger one" in conflict.message for conflict in found].count(True) == 1
    assert not read_facts(tmp_path / "teacher").has_other_parts


def test_a_teacher_whose_students_no_owner_can_use_is_refused(tmp_path: Path) -> None:
    run = tiny.write_run(tmp_path)
    words = load_tokenizer(tmp_path / "teacher")
    assert check_run(load_run(run)).ok
    words.add_special_tokens({"pad_token": "[PAD]"})
    words.save_pretrained(tmp_path / "teacher")
    found = check_run(load_run(run)).conflicts
    assert any("no embeddings" in conflict.message for conflict in found)
    with pytest.raises(InputError, match="no embeddings"):
        check_distillation(load_run(run), tmp_path / "teacher", World(0, 1, 0, "none", CPU))


def test_a_family_that_no_owner_knows_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tiny.write_run(tmp_path)
    sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 128}
    config = transformers.GPTNeoConfig(
        **TOKENS, **sizes, attention_types=[[["global"], 2]], window_size=8
    )
    for family in ("llama", "gpt_neo"):
        if family == "gpt_neo":
            write(tmp_path / "teacher", config)
        caplog.clear()
        check_distillation(load_run(run), tmp_path / "teacher", World(0, 1, 0, "none", CPU))
        assert ("know no family" in caplog.text) == (family == "gpt_neo")


def test_a_window_that_the_mask_alone_knows_keeps_the_prompt_apart(tmp_path: Path) -> None:
    """Texts longer than the window would attend too far back behind a shared prompt."""
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1, "num_key_value_heads": 2}
    for window in (8, None):
        config = transformers.PhimoeConfig(**SIZES, **experts, sliding_window=window)
        model = load_whole(write(tmp_path / f"{window}", config), "fp32", CPU)
        assert model.shares_prompt == (window is None)


def test_a_masked_model_that_reads_padding_is_refused(tmp_path: Path) -> None:
    sizes = {name: size for name, size in SIZES.items() if name != "num_attention_heads"}
    folder = write(tmp_path / "fnet", transformers.FNetConfig(**sizes), "FNetForMaskedLM")
    with pytest.raises(InputError, match="reads padding"):
        load_whole(folder, "fp32", CPU)


@pytest.mark.parametrize(
    "family", ["Longformer", "MPNet", "RobertaPreLayerNorm", "XLMRobertaXL", "Data2VecText"]
)
def test_positions_start_after_the_padding(family: str) -> None:
    settings = {"attention_window": 8} if family == "Longformer" else {}
    config = getattr(transformers, f"{family}Config")(**(SIZES | {"pad_token_id": 1}), **settings)
    config.architectures = [f"{family}ForMaskedLM"]
    assert meta_from_config(config).context_length == 126


def test_a_recurrent_model_generates_texts_of_one_length_together(tmp_path: Path) -> None:
    """It would read the padding before a shorter text."""
    folder = write(tmp_path / "rwkv", RECURRENT["rwkv"]())
    model = load_whole(folder, "fp32", CPU)
    assert not model.ignores_left_padding
    words = load_tokenizer(folder)
    template = Template("{text}", words, 48, masked=False, vocabulary=600, max_response_length=6)
    texts = ["the film", "the long story of the cast is great", "a plot of no scene at all"]
    examples = template.encode(texts)

    def answers(size: int) -> torch.Tensor:
        run = InferenceRun(size, World(0, 1, 0, "none", CPU), "test")
        return generate_responses(model, examples, template, None, 2, run)

    torch.testing.assert_close(answers(3), answers(1))


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "gemma2"])
def test_attention_ignores_padding(tmp_path: Path, family: str) -> None:
    model = load_whole(tiny.write_model(tmp_path / "model", family), "fp32", CPU)
    assert model.ignores_left_padding


def test_a_model_that_cannot_generate_behind_embeddings_is_refused(tmp_path: Path) -> None:
    config = transformers.OpenAIGPTConfig(
        vocab_size=600, n_embd=32, n_layer=2, n_head=4, n_positions=128
    )
    config.save_pretrained(tmp_path)
    facts = read_facts(tmp_path)
    assert not facts.generates
    assert generation_conflicts("the model", facts, 0) == []
    [conflict] = generation_conflicts("the model", facts, 8)
    assert "cannot generate text" in conflict.message
    assert read_facts(tiny.write_model(tmp_path / "llama", "llama")).generates


@pytest.mark.parametrize("way", ["auto", "first_last"])
def test_layers_that_return_more_than_states_can_be_left_out(tmp_path: Path, way: str) -> None:
    """DeBERTa's layers return a place for attention weights too."""
    config = transformers.DebertaV2Config(
        **SIZES, relative_attention=True, pos_att_type=["c2p", "p2c"], position_buckets=8
    )
    folder = write(tmp_path / "deberta", config, "DebertaV2ForMaskedLM")
    teacher = load_whole(folder, "fp32", CPU)
    layers = (0, 3)
    if way == "auto":
        batches = [(torch.randint(4, 500, (2, 8)), 1.0)]
        alone = World(0, 1, 0, "none", CPU)
        layers = least_harmful_layers(teacher, batches, 2, 0, alone)
    (tmp_path / "student").mkdir()
    write_student(tmp_path / "student", folder, layers, load_tokenizer(folder))
    check_cut(teacher, load_whole(tmp_path / "student", "fp32", CPU), layers)
