"""Models of each family: trunk and head, the prompt in front, and the student cut from them."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    LlamaConfig,
    MptConfig,
    PreTrainedConfig,
)

from post_dist.artifacts.prompt import PromptContents, write_prompt_files
from post_dist.artifacts.task import PromptTask
from post_dist.config.schema import Student
from post_dist.config.stages import LoraSettings
from post_dist.data.template import Template
from post_dist.errors import InputError
from post_dist.models.batch_inference import InferenceRun, outputs_at_answers
from post_dist.models.cut import check_same_layers
from post_dist.models.facts import meta_model
from post_dist.models.language_model import LanguageModel
from post_dist.models.load import load_tokenizer, load_whole, model_settings, tokenizer_fingerprint
from post_dist.models.lora_layers import lora_conflicts
from post_dist.models.lower_block import forward_above, forward_with_below, take_out_lower_block
from post_dist.models.model_checks import check_documents_apart
from post_dist.models.prompt_init import prompt_from_text
from post_dist.models.student import (
    check_cut,
    freeze,
    least_harmful_layers,
    listed_layers,
    stand_in_layers,
    write_student,
)
from post_dist.runtime.distributed import World
from post_dist.stages.context_length import context_conflicts

CPU = torch.device("cpu")
ALONE = World(0, 1, 0, "none", CPU)
TASK = PromptTask("{text} It was", (("bad",), ("good",)), 48, False, "predict it")


@pytest.fixture(scope="session", params=[*tiny.FAMILIES, "deepseek_v3", "gpt_oss"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp(request.param), request.param)


def batch_of(folder: Path, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    masked = "roberta" in folder.name
    template = Template(
        "{text} It was {mask}." if masked else "{text} It was",
        load_tokenizer(folder),
        48,
        masked=masked,
        vocabulary=600,
    )
    batch = template.collate(template.encode(texts))
    return batch.input_ids, batch.attention_mask, batch.answer


@torch.no_grad()
def test_prompted_logits_are_peft_s(folder: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    model = load_whole(folder, "fp32", CPU)
    prompt = torch.randn(5, model.width)
    task = replace(TASK, template="{text} It was {mask}.") if model.masked else TASK
    write_prompt_files(tmp_path, PromptContents(prompt, task, None), "m")
    input_ids, mask, answer = batch_of(
        folder, ["the film is dull", "the long story of the cast is great"]
    )
    ours = model(input_ids, mask, prompt, answer)
    theirs = PeftModel.from_pretrained(model.model, str(tmp_path))(
        input_ids=input_ids, attention_mask=mask
    ).logits
    if theirs.shape[1] == input_ids.shape[1]:
        pytest.fail("PEFT's logits do not cover the prompt")
    torch.testing.assert_close(ours, theirs[torch.arange(2), answer + 5], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_logits_do_not_depend_on_padding_or_company(folder: Path) -> None:
    model = load_whole(folder, "fp32", CPU)
    prompt = torch.randn(5, model.width)
    texts = ["the film is dull", "the long story of the cast is great"]
    together = model(*batch_of(folder, texts)[:2], prompt, batch_of(folder, texts)[2])
    for row, text in zip(together, texts, strict=True):
        input_ids, mask, answer = batch_of(folder, [text])
        torch.testing.assert_close(
            model(input_ids, mask, prompt, answer)[0], row, rtol=1e-4, atol=1e-5
        )


@torch.no_grad()
def test_states_of_several_layers_are_those_of_transformers(folder: Path) -> None:
    model = load_whole(folder, "fp32", CPU)
    input_ids, mask, answer = batch_of(
        folder, ["the film is dull", "the long story of the cast is great"]
    )
    prompt = torch.randn(5, model.width)
    whole = model.model.base_model(
        inputs_embeds=model.embed_behind(prompt, input_ids),
        attention_mask=torch.cat([mask.new_ones(2, 5), mask], dim=1),
        output_hidden_states=True,
    ).hidden_states
    # The first one holds the embeddings, and the last one has passed the last norm.
    layers = sorted({0, len(model.layers) - 2, len(model.layers) - 1})
    expected = torch.cat([whole[1 + layer][[0, 1], answer + 5] for layer in layers], dim=-1)
    ways = {"behind a prompt": model(input_ids, mask, prompt, answer, layers=layers)}
    if not model.masked:
        prefix = model.prefix_of(prompt)
        ways["behind a prefix"] = model(input_ids, mask, None, answer, prefix, layers=layers)
    if model.shares_prompt:
        arguments = (input_ids, mask, prompt, answer)
        ways["shared"] = model(*arguments, share_prompt=True, layers=layers)
    for way, states in ways.items():
        torch.testing.assert_close(states, expected, rtol=1e-4, atol=1e-5, msg=way)


@torch.no_grad()
def test_answers_come_in_the_order_of_the_rows(folder: Path) -> None:
    model = load_whole(folder, "fp32", CPU)
    masked = model.masked
    template = Template(
        "{text} It was {mask}." if masked else "{text} It was",
        load_tokenizer(folder),
        48,
        masked=masked,
        vocabulary=600,
    )
    rows = template.encode([text for text, _ in tiny.sentences(11, 5)])
    prompt = torch.randn(3, model.width)
    run = InferenceRun(batch_size=4, world=ALONE, label="rows")
    ours = outputs_at_answers(model, rows, template, prompt, torch.Tensor.detach, run)
    for row, logits in zip(rows, ours, strict=True):
        batch = template.collate([row])
        torch.testing.assert_close(
            model(batch.input_ids, batch.attention_mask, prompt, batch.answer)[0],
            logits,
            rtol=1e-4,
            atol=1e-5,
        )


@pytest.mark.parametrize("checkpointed", [False, True])
def test_rows_behind_shared_prompts_are_as_behind_one_each(
    folder: Path, checkpointed: bool
) -> None:
    model = load_whole(folder, "fp32", CPU)
    if model.masked:
        assert not model.shares_prompt
        return
    assert model.shares_prompt
    if checkpointed:
        model.checkpoint_activations()
    prompts = torch.randn(2, 5, model.width, requires_grad=True)
    input_ids, mask, answer = batch_of(folder, [text for text, _ in tiny.sentences(6, 3)])
    apart = model(input_ids, mask, prompts.repeat_interleave(3, dim=0), answer)
    shared = model(input_ids, mask, prompts, answer, share_prompt=True)
    torch.testing.assert_close(shared, apart, rtol=1e-4, atol=1e-5)
    weights = torch.randn_like(apart)
    of_apart, of_shared = (
        torch.autograd.grad((weights * logits).sum(), prompts)[0] for logits in (apart, shared)
    )
    torch.testing.assert_close(
        of_shared, of_apart, rtol=1e-4, atol=1e-5 * float(of_apart.abs().max())
    )


@torch.no_grad()
def test_packed_documents_do_not_see_each_other(folder: Path) -> None:
    model = load_whole(folder, "fp32", CPU)
    if model.masked:
        return
    if "gpt_oss" in folder.name:
        with pytest.raises(InputError, match="attends across packed documents"):
            check_documents_apart(model)
        return
    first, second = torch.arange(4, 11)[None], torch.arange(30, 42)[None]
    positions = torch.cat([torch.arange(7), torch.arange(12)])[None].expand(2, -1)
    together = model(torch.cat([first, second], dim=1).expand(2, -1), position_ids=positions)
    for row in together:
        torch.testing.assert_close(row[:7], model(first)[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(row[7:], model(second)[0], rtol=1e-4, atol=1e-5)
    check_documents_apart(model)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_activations_that_are_computed_twice_come_out_alike(tmp_path: Path, family: str) -> None:
    """Though OPT's layers drop out a tenth wherever they are told that they train."""
    model = load_whole(tiny.write_model(tmp_path, family), "fp32", CPU)
    prompt = torch.randn(5, model.width, requires_grad=True)
    input_ids, answer = torch.randint(4, 500, (3, 12)), torch.tensor([11, 4, 7])
    ran: list[nn.Module] = []
    for layer in model.layers:
        layer.self_attn.register_forward_hook(lambda module, given, made: ran.append(module))
    made = []
    for checkpointed in (False, True):
        if checkpointed:
            model.checkpoint_activations()
        ran.clear()
        logits = model(input_ids, None, prompt, answer)
        made.append((logits, *torch.autograd.grad(logits.square().sum(), prompt)))
        assert [ran.count(layer.self_attn) for layer in model.layers] == [1 + checkpointed] * 3 + [
            1
        ]
    for plain, twice in zip(*made, strict=True):
        assert torch.equal(plain, twice)


def test_a_last_mlp_that_is_given_the_residual_stream_runs_at_the_answers_alone() -> None:
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=60, hidden_size=16, n_layer=2, n_head=2)
    model = LanguageModel(AutoModelForCausalLM.from_config(config).eval(), masked=False)
    input_ids = torch.randint(60, (2, 7))
    answers = torch.tensor([6, 3])
    with torch.no_grad():
        everywhere = model(input_ids)
        at_answers = model(input_ids, answer=answers, layers=[1])
    assert torch.allclose(at_answers, everywhere[torch.arange(2), answers], rtol=1e-5)


def test_the_head_runs_beside_earlier_answers_or_not_at_all(folder: Path) -> None:
    model = load_whole(folder, "fp32", CPU)
    input_ids, mask, answer = batch_of(
        folder, ["the film is dull", "the long story of the cast is great"]
    )
    hidden = model(input_ids, mask, None, answer, layers=[len(model.layers) - 1])
    logits = model(input_ids, mask, None, answer, beside=hidden[1:])
    torch.testing.assert_close(logits, model.head(torch.cat([hidden, hidden[1:]])))
    torch.testing.assert_close(logits[1], logits[2])
    torch.testing.assert_close(
        model(input_ids, mask, None, answer, tokens=[7, 3, 7]), logits[:2, [7, 3, 7]]
    )


@torch.no_grad()
def test_a_student_of_all_layers_is_its_teacher(folder: Path, tmp_path: Path) -> None:
    write_student(tmp_path, folder, (0, 1, 2, 3), load_tokenizer(folder))
    input_ids = torch.arange(4, 20)[None]
    assert torch.equal(
        load_whole(tmp_path, "fp32", CPU)(input_ids), load_whole(folder, "fp32", CPU)(input_ids)
    )


@torch.no_grad()
def test_a_student_of_some_layers_is_its_teacher_without_the_others(
    folder: Path, tmp_path: Path
) -> None:
    write_student(tmp_path, folder, (0, 3), load_tokenizer(folder))
    teacher = load_whole(folder, "fp32", CPU)
    layers = teacher.layers
    del layers[1:3]
    teacher.model.config.num_hidden_layers = 2
    kinds = getattr(teacher.model.config, "layer_types", None)
    if kinds:
        teacher.model.config.layer_types = [kinds[0], kinds[3]]
    input_ids = torch.arange(4, 20)[None]
    torch.testing.assert_close(load_whole(tmp_path, "fp32", CPU)(input_ids), teacher(input_ids))


@pytest.mark.parametrize("family", [*tiny.FAMILIES, "falcon"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_student_goes_on_from_what_the_teacher_s_lower_layers_made(
    tmp_path: Path, family: str, checkpointed: bool
) -> None:
    folder = tiny.write_model(tmp_path / "teacher", family)
    rule = Student(layers=(0, 1, 3), frozen_lower_layers=2)
    (tmp_path / "student").mkdir()
    write_student(tmp_path / "student", folder, (0, 1, 3), load_tokenizer(folder))
    teacher, whole, upper = (
        load_whole(folder, "fp32", CPU),
        *(load_whole(tmp_path / "student", "fp32", CPU) for _ in range(2)),
    )
    input_ids = torch.arange(4, 24).view(2, 10)
    positions = (
        None if whole.masked else torch.cat([torch.arange(4), torch.arange(6)]).expand(2, -1)
    )
    for student in (whole, upper):
        freeze(student, rule)
    take_out_lower_block(upper, 2)
    if checkpointed:
        upper.checkpoint_activations()
    with torch.no_grad():
        hidden, below = forward_with_below(teacher, 2, input_ids, positions)
    assert torch.equal(hidden, teacher(input_ids, position_ids=positions))
    ours, plain = forward_above(upper, below, positions), whole(input_ids, position_ids=positions)
    assert torch.equal(ours, plain)
    weights = torch.randn_like(plain)
    for made in (ours, plain):
        (weights * made).sum().backward()
    kept, expected = dict(upper.named_parameters()), dict(whole.named_parameters())
    trained = [name for name, parameter in expected.items() if parameter.requires_grad]
    assert trained
    assert all(torch.equal(kept[name].grad, expected[name].grad) for name in trained)
    gone = {
        name
        for name in expected
        if any(f".{part}.{index}." in name for part in ("layers", "h", "layer") for index in (0, 1))
    }
    assert gone
    assert not gone & set(kept)


def test_embeddings_and_head_are_frozen_by_default(folder: Path) -> None:
    student = load_whole(folder, "fp32", CPU)
    freeze(student, Student(layers=(0, 1, 2, 3), frozen_lower_layers=2))
    trained = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
    in_upper_layers = {
        name
        for name, _ in student.named_parameters()
        if any(f".{part}.{index}." in name for part in ("layers", "h", "layer") for index in (2, 3))
    }
    assert trained == in_upper_layers
    freeze(student, Student(layers=(0, 1, 2, 3), freeze_embeddings=False, freeze_head=False))
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_the_layer_that_does_nothing_is_dropped_first(folder: Path) -> None:
    model = load_whole(folder, "fp32", CPU)
    outputs = [
        name
        for name, _ in model.layers[2].named_parameters()
        if any(part in name for part in ("o_proj", "down_proj", "c_proj", "output.dense"))
    ]
    for name, parameter in model.layers[2].named_parameters():
        if name in outputs or ("gemma2" in folder.name and "post_" in name):
            parameter.data.zero_()
    if "gemma2" in folder.name:
        for name, parameter in model.layers[2].named_parameters():
            if name.startswith("post_"):
                parameter.data.fill_(-1)  # Gemma's norms scale by one plus their weight
    if model.masked:
        pytest.skip("RoBERTa's layers end in a layer norm, so none of them does nothing")
    kept = least_harmful_layers(model, [(torch.arange(4, 20).repeat(3, 1), 1.0)], 3, 0, ALONE)
    assert kept == (0, 1, 3)


def test_layer_rules() -> None:
    assert listed_layers(Student(layers="first_last", num_layers=2), 32) == (0, 31)
    assert listed_layers(Student(layers="first_last", num_layers=4), 48) == (0, 1, 46, 47)
    assert listed_layers(Student(layers="even", num_layers=4), 10) == (0, 3, 6, 9)
    assert listed_layers(Student(layers=(0, 5)), 6) == (0, 5)
    with pytest.raises(InputError, match="the teacher has layers 0 to 5"):
        listed_layers(Student(layers=(0, 6)), 6)
    assert listed_layers(Student(layers="first_last", num_layers=4, frozen_lower_layers=2), 48)[
        :2
    ] == (0, 1)
    assert listed_layers(Student(layers="even", num_layers=1), 10) == (0,)
    assert listed_layers(Student(layers="even", num_layers=4, frozen_lower_layers=1), 10) == (
        0,
        3,
        6,
        9,
    )
    assert listed_layers(Student(layers="even", num_layers=5, frozen_lower_layers=3), 10) == (
        0,
        1,
        2,
        6,
        9,
    )
    assert stand_in_layers(Student(layers="auto", num_layers=4, frozen_lower_layers=2), 10) == (
        0,
        1,
        5,
        9,
    )
    with pytest.raises(InputError, match="own first layers"):
        listed_layers(Student(layers="first_last", num_layers=4, frozen_lower_layers=3), 48)


def test_prompt_starts_from_the_words_of_a_text(folder: Path) -> None:
    model, words = load_whole(folder, "fp32", CPU), load_tokenizer(folder)
    tokens = words("the film is", add_special_tokens=False).input_ids
    wanted = model.embed(torch.tensor((tokens * 3)[:5]))
    assert torch.equal(prompt_from_text(model, words, "the film is", 5), wanted)


def test_a_model_without_linear_modules_is_the_wrong_one_for_a_lora() -> None:
    settings = LoraSettings(target_modules=("q_proj",))
    (conflict,) = lora_conflicts("tune", settings, [{}, {}], "bloom")
    assert conflict.hint == "choose another model"
    (conflict,) = lora_conflicts("tune", settings, [{"attn.query": (4, 4)}], "bloom")
    assert conflict.hint == "choose from query"


def test_prompt_and_text_must_fit_the_context(folder: Path) -> None:
    model = load_whole(folder, "fp32", CPU)
    assert context_conflicts("the model", model.context_length, 28, 100, "") == []
    (conflict,) = context_conflicts("the model", model.context_length, 40, 100, "cut it")
    context = f"do not fit into the context of the model ({model.context_length})"
    assert conflict.message == f"a prompt of 40 tokens and texts of 100 tokens {context}"
    assert conflict.hint == "cut it"
    (conflict,) = context_conflicts("the model", model.context_length, 0, 140, "")
    assert conflict.message == f"texts of 140 tokens {context}"


@pytest.mark.parametrize(
    ("config", "longest"),
    [
        (BloomConfig(vocab_size=60, hidden_size=16, n_layer=2, n_head=2), math.inf),
        (MptConfig(vocab_size=60, d_model=16, n_layers=2, n_heads=2, max_seq_len=64), 64),
    ],
)
def test_a_context_that_is_not_counted_in_position_embeddings(
    config: PreTrainedConfig, longest: float
) -> None:
    model = LanguageModel(AutoModelForCausalLM.from_config(config), masked=False)
    assert model.context_length == longest
    assert context_conflicts("the model", model.context_length, 4, 60, "") == []


@pytest.mark.parametrize(
    ("config", "kind"),
    [(LlamaConfig(), "sdpa"), (Gemma2Config(), "eager"), (BloomConfig(), "eager")],
)
def test_attention_is_fused_on_a_gpu_where_the_family_has_it(
    tmp_path: Path, config: PreTrainedConfig, kind: str
) -> None:
    config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    settings = model_settings(tmp_path, "bf16", torch.device("cuda"))
    with torch.device("meta"):
        model = settings.auto_class.from_config(config, **settings.arguments)
    assert model.config._attn_implementation == kind


def test_tokenizers_are_told_apart(tmp_path: Path) -> None:
    words = tiny.tokenizer("llama")
    same = tokenizer_fingerprint(words)
    assert tokenizer_fingerprint(tiny.tokenizer("llama")) == same
    words.add_tokens(["brandnew"])
    assert tokenizer_fingerprint(words) != same


def test_weights_that_are_missing_are_never_left_random(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    tiny.write_model(tmp_path, "qwen2")
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lacks weights, such as lm_head\.weight"):
        load_whole(tmp_path, "fp32", CPU)


@torch.no_grad()
def test_a_student_of_a_quantized_teacher_is_not_quantized(tmp_path: Path) -> None:
    folder = tiny.quantize(tiny.write_model(tmp_path / "teacher", "deepseek_v3"))
    student = tmp_path / "student"
    student.mkdir()
    write_student(student, folder, (0, 1, 2, 3), load_tokenizer(folder))
    assert "quantization_config" not in (student / "config.json").read_text()
    assert {tensor.dtype for tensor in load_file(student / "model.safetensors").values()} == {
        torch.float32
    }
    input_ids = torch.arange(4, 20)[None]
    teacher = load_whole(folder, "fp32", CPU)
    assert torch.equal(load_whole(student, "fp32", CPU)(input_ids), teacher(input_ids))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="quantized with awq"):
        load_whole(folder, "fp32", CPU)


def test_a_layer_keeps_its_kind_in_a_student(tmp_path: Path) -> None:
    folder = tiny.write_model(tmp_path / "teacher", "deepseek_v3")
    student = tmp_path / "student"
    student.mkdir()
    # Its first layer is dense, and the others are mixtures.
    write_student(student, folder, (1, 3), load_tokenizer(folder))
    teacher, cut = load_whole(folder, "fp32", CPU), load_whole(student, "fp32", CPU)
    assert cut.model.config.first_k_dense_replace == 0
    check_cut(teacher, cut, (1, 3))
    with pytest.raises(InputError, match="depends on its place"):
        check_cut(teacher, cut, (1, 2))
    whole = meta_model(folder)
    with pytest.raises(InputError, match="layer 1 cannot be layer 0"):
        check_same_layers(whole, whole, (1, 2))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_answer_is_the_head_over_the_whole_trunk(tmp_path: Path, family: str) -> None:
    """Though the last layer's MLP runs at the answer alone, and a prefix may replace the prompt."""
    model = load_whole(tiny.write_model(tmp_path / "model", family), "fp32", torch.device("cpu"))
    input_ids, answer = torch.randint(4, 500, (3, 12)), torch.tensor([11, 4, 7])
    prompt = torch.randn(5, 32)
    whole = model.head(model(input_ids, None, prompt)[torch.arange(3), answer + 5])
    torch.testing.assert_close(model(input_ids, None, prompt, answer), whole)
    if not model.masked:
        torch.testing.assert_close(
            model(input_ids, None, None, answer, model.prefix_of(prompt)), whole
        )
