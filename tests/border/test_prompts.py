"""Prompts of another party: what is refused, and that nothing else than a refusal happens."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from border.fuzz import fuzz, prompts, swap
from border.hostile import (
    Change,
    edit_json,
    put_text,
    replace_by_fifo,
    replace_by_link,
    replace_by_sparse,
    sign,
)
from border.prompt_changes import write_lora, write_prefix
from safetensors.torch import load_file, save_file

from post_dist.admission.door import admit_prompt
from post_dist.artifacts.lora import DOWN, Lora
from post_dist.artifacts.manifest import ArtifactKind, parse_manifest
from post_dist.artifacts.prompt import (
    PUBLIC_PROMPT,
    PromptContents,
    Provenance,
    read_prompt,
    write_prompt,
)
from post_dist.artifacts.task import PromptTask
from post_dist.config.stages import LoraSettings
from post_dist.errors import ArtifactRefused
from post_dist.files import fingerprint
from post_dist.models.facts import read_facts
from post_dist.models.load import load_tokenizer, tokenizer_fingerprint, weights_of
from post_dist.verify import verify

HONEST = Path(__file__).parents[1] / "data/artifacts_0_1_0/source_prompt"
TASK = PromptTask("Review: {text} It was", (("bad",), ("good",)), 48, False, "Classify")
WEIGHTS = "adapter_model.safetensors"


def with_header(header: Any, *, encoding: str = "utf-8", data: bytes = bytes(640)) -> Change:
    """Return a change that writes a safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode(encoding)
    return put_text(WEIGHTS, struct.pack("<Q", len(text)) + text + data)


def entry(**changes: Any) -> dict:
    own = {"dtype": "F32", "shape": [5, 32], "data_offsets": [0, 640]}
    return {"prompt_embeddings": own | changes}


def task(**fields: Any) -> Change:
    return edit_json("task.json", **fields)


def adapter(**fields: Any) -> Change:
    return edit_json("adapter_config.json", **fields)


def privacy(**fields: Any) -> Change:
    return edit_json("privacy.json", **fields)


def edit_tune(**fields: Any) -> Change:
    """Return a change of the settings of tuning in the manifest."""

    def change(folder: Path) -> None:
        path = folder / "post_dist.json"
        manifest = json.loads(path.read_text())
        manifest["config"]["tune"] |= fields
        path.write_text(json.dumps(manifest))

    return change


def put_number(field: str, digits: str) -> Change:
    """Return a change of a claim to a number that Python does not write."""

    def change(folder: Path) -> None:
        path = folder / "privacy.json"
        statement = json.loads(path.read_text()) | {field: "digits"}
        path.write_text(json.dumps(statement).replace('"digits"', digits))

    return change


REFUSED: dict[str, Change] = {
    "weights through a link": replace_by_link(WEIGHTS),
    "manifest through a link": replace_by_link("post_dist.json"),
    "task in a FIFO": replace_by_fifo("task.json"),
    "sparse weights": replace_by_sparse(WEIGHTS, 1 << 40),
    "sparse card": replace_by_sparse("README.md", 1 << 30),
    "a folder": lambda folder: (folder / "lora").mkdir(),
    "a pickle": put_text("adapter_model.bin", b"\x80\x04."),
    "one more file": put_text("more.json", "{}"),
    "another adapter": adapter(peft_type="LORA"),
    "an adapter with code": adapter(peft_type="BOFT"),
    "another number of tokens": adapter(num_virtual_tokens=6),
    "another width": adapter(token_dim=31),
    "true tokens": adapter(num_virtual_tokens=True),
    "modules to save": adapter(modules_to_save=["lm_head"]),
    "code of the sender": adapter(auto_mapping={"base_model_class": "x", "parent_library": "os"}),
    "a tokenizer of the sender": adapter(tokenizer_name_or_path="/outside"),
    "a field that PEFT may learn": adapter(anything=1),
    "a number for a name": adapter(base_model_name_or_path=7),
    "an adapter that is no object": put_text("adapter_config.json", "[]"),
    "no text in the template": task(template="It was"),
    "two texts in the template": task(template="{text} {text}"),
    "a field of the template": task(template="{text.__class__}"),
    "a template that formats the text": task(template="{text:>99999999}"),
    "a template that converts the text": task(template="{text!r}"),
    "a place in a place": task(template="{{text}} {text}"),
    "braces that do not pair up": task(template="{text"),
    "a template that is a list": task(template=["{text}"]),
    "a surrogate in the template": put_text(
        "task.json", (HONEST / "task.json").read_text().replace("{text}", "{text}\\ud800")
    ),
    "a word as letters": task(label_words=["bad", "good"]),
    "an empty class": task(label_words=[["bad"], []]),
    "an empty word": task(label_words=[["bad"], [" "]]),
    "a word that turns the writing": task(label_words=[["bad"], ["\u202egood"]]),
    "a word that colors the terminal": task(label_words=[["bad"], ["\x1b[31mgood"]]),
    "a word on two lines": task(label_words=[["bad"], ["good\nok: True"]]),
    "a template that colors the terminal": task(template="\x1b[31m{text}"),
    "a key of the task twice": put_text(
        "task.json", (HONEST / "task.json").read_text().replace("{", '{"max_length": 48,', 1)
    ),
    "a number as a word": task(label_words=[["bad"], [7]]),
    "one class": task(label_words=[["bad"]]),
    "huge biases": task(class_biases=[9999.0, 0.0]),
    "biases that are texts": task(class_biases=["inf", "nan"]),
    "one bias": task(class_biases=[0.5]),
    "names as letters": task(label_names="no"),
    "one name": task(label_names=["no"]),
    "the same name twice": task(label_names=["no", "no"]),
    "a number as a name": task(label_names=["no", 1]),
    "an escape in a name": task(label_names=["no", "\x1b[2J"]),
    "a line break in a name": task(label_names=["no", "y\nes"]),
    "an endless name": task(label_names=["no", "y" * 101]),
    "a length of zero": task(max_length=0),
    "a length as text": task(max_length="48"),
    "an unknown field of a task": task(more=1),
    "a header in UTF-16": with_header(entry(), encoding="utf-16"),
    "metadata that are numbers": with_header({"__metadata__": {"format": 1}} | entry()),
    "metadata that are a list": with_header({"__metadata__": []} | entry()),
    "a shape with a boolean": with_header(entry(shape=[True, 160])),
    "offsets with a boolean": with_header(entry(data_offsets=[False, 640])),
    "negative offsets": with_header(entry(data_offsets=[-640, 0])),
    "a gap before the data": with_header(entry(data_offsets=[4, 644]), data=bytes(644)),
    "data behind the tensors": with_header(entry(), data=bytes(700)),
    "too few data": with_header(entry(), data=bytes(100)),
    "a huge shape": with_header(entry(shape=[1 << 40, 1 << 40])),
    "an unknown dtype": with_header(entry(dtype="F8_E4M3")),
    "a dtype that is a list": with_header(entry(dtype=["F32"])),
    "one more field": with_header(entry(more=1)),
    "one more tensor": with_header(entry() | {"x": {"dtype": "F32", "shape": [1]}}),
    "a name with a surrogate": with_header(b'{"\\ud800": {}}'),
    "a key twice": with_header(b'{"prompt_embeddings": {}, "prompt_embeddings": {}}'),
    "a header that is a list": with_header([]),
    "a deep header": with_header(b'{"a":' * 9000 + b"1" + b"}" * 9000),
    "epsilon too good": privacy(epsilon=0.01),
    "a sampling probability of another batch": privacy(
        sampling_probability=1e-6, expected_batch_size=8.0, declared_examples=160
    ),
    "another divisor": privacy(expected_batch_size=1e9),
    "a manifest with another plan": edit_json(
        "post_dist.json", config={"tune": {"steps": 600}, "privacy": {"enabled": True}}
    ),
    "a manifest with noise from a seed": edit_json(
        "post_dist.json",
        config={"tune": {}, "privacy": {"enabled": True, "noise_source": "seeded"}},
    ),
    "a manifest without privacy": edit_json(
        "post_dist.json", config={"privacy": {"enabled": False}}
    ),
    "a manifest that says nothing of privacy": edit_json("post_dist.json", config={"tune": {}}),
    "a manifest with privacy that is none": edit_json(
        "post_dist.json", config={"tune": {}, "privacy": [True]}
    ),
    "a manifest with more vectors": edit_tune(num_virtual_tokens=99),
    "a manifest with vectors that are true": edit_tune(num_virtual_tokens=True),
    "a manifest with another adapter": edit_tune(adapter="lora"),
    "a manifest with an adapter that is a list": edit_tune(adapter=["prompt"]),
    "epsilon as text": privacy(epsilon="0.01"),
    "infinite steps": privacy(steps=10**30),
    "delta 1": privacy(delta=1.0),
    "negative delta": privacy(delta=-1e-5),
    "no noise": privacy(noise_multiplier=0.0),
    "a statement that is a list": put_text("privacy.json", "[1]"),
    "a claim in other words": privacy(certified="epsilon 0.001"),
    "a claim for another delta": privacy(
        epsilon_at_delta={"1e-06": 2.1, "1 / (100 declared_examples)": 1.2, "0": 0.01}
    ),
    "a claim of another accountant": privacy(cross_checks={"rdp": 0.9, "prv": 0.5, "best": 0.1}),
    "a number in place of a boolean": privacy(private=1),
    "a lineage without the model": edit_json("post_dist.json", parents={}),
    "a lineage that holds anything": edit_json(
        "post_dist.json", parents={"model": "1" * 64, "other": "\x1b[31m"}
    ),
    "a claim of infinity": put_number("true_positive_rate_at_1_percent_false", "1e999"),
    "a claim that no float holds": put_number("true_positive_rate_at_1_percent_false", 400 * "9"),
}
UNCOMPUTED: dict[str, dict[str, int]] = {
    "4 kinds of repeats": {str(times): 1 for times in (2, 3, 4, 5)},
    "repeats that leave little noise": {"26": 1},
    "repeats under two names": {"2": 1, "02": 1},
    "99 kinds of repeats": {str(times): 1 for times in range(2, 101)},
}
"""Repeated steps on which an accountant would spend long, or that it would read as fewer."""


def hostile(folder: Path, change: Change) -> Path:
    prompt = shutil.copytree(HONEST, folder / "sent")
    change(prompt)
    sign(prompt)
    return prompt


@pytest.mark.parametrize("attack", REFUSED)
def test_a_hostile_prompt_is_refused(tmp_path: Path, attack: str) -> None:
    sent = hostile(tmp_path, REFUSED[attack])
    result = verify(sent)
    assert not result["ok"]
    for problem in result["problems"]:
        assert all(line.isprintable() for line in problem.splitlines())
    with pytest.raises(ArtifactRefused):
        admit_prompt(sent)


@pytest.mark.parametrize("repeats", UNCOMPUTED)
def test_repeats_beyond_bounds_are_refused_before_an_accountant_runs(
    tmp_path: Path, repeats: str
) -> None:
    sent = hostile(tmp_path, privacy(steps_repeated=UNCOMPUTED[repeats]))
    (problem,) = verify(sent)["problems"]
    assert "lacks the numbers that its epsilon is computed from" in problem


def change_factors(change: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    """Return a change of the tensors of a LoRA."""

    def changed(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return changed


def renamed(old: str, new: str) -> Change:
    """Return a change of the names of a LoRA's tensors."""

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in sorted(tensors):
            tensors[name.replace(old, new)] = tensors.pop(name)

    return change_factors(rename)


FACTOR = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
REFUSED_LORAS: dict[str, Change] = {
    "another rank": adapter(r=3),
    "a rank that is true": adapter(r=True),
    "no rank": adapter(r=None),
    "alpha of zero": adapter(lora_alpha=0),
    "alpha without end": adapter(lora_alpha=1e300),
    "alpha as text": adapter(lora_alpha="8"),
    "another adapter": adapter(peft_type="PROMPT_TUNING"),
    "biases": adapter(bias="all"),
    "weights that are decomposed": adapter(use_dora=True),
    "a scale of another rule": adapter(use_rslora=True),
    "ranks by layer": adapter(rank_pattern={"q_proj": 9}),
    "alphas by layer": adapter(alpha_pattern={"q_proj": 9}),
    "modules to save": adapter(modules_to_save=["lm_head"]),
    "code of the sender": adapter(auto_mapping={"base_model_class": "x"}),
    "first values from a file": adapter(init_lora_weights="pissa"),
    "settings of another kind": adapter(loftq_config={"x": 1}),
    "a field that PEFT may learn": adapter(anything=1),
    "all modules": adapter(target_modules="all-linear"),
    "a module without factors": adapter(target_modules=["q_proj", "lm_head"]),
    "a layer that is not named": adapter(target_modules=["layers.0.self_attn.q_proj"]),
    "a module that is a number": adapter(target_modules=[7]),
    "a prompt of another form": put_text("prompt.safetensors", b"\x80\x04."),
    "a head as well": put_text("head.safetensors", b"\x80\x04."),
    "sparse factors": replace_by_sparse(WEIGHTS, 1 << 40),
    "factors through a link": replace_by_link(WEIGHTS),
    "no prompt in front": lambda folder: (folder / "prompt.safetensors").unlink(),
    "one factor": change_factors(lambda tensors: tensors.pop(FACTOR)),
    "factors of two ranks": change_factors(lambda t: t.update({FACTOR: torch.zeros(3, 32)})),
    "a factor that is a vector": change_factors(lambda t: t.update({FACTOR: torch.zeros(32)})),
    "a huge value": change_factors(lambda t: t[FACTOR].fill_(1e9)),
    "an infinite value": change_factors(lambda t: t[FACTOR].fill_(float("inf"))),
    "one more tensor": change_factors(lambda t: t.update({"more": torch.zeros(2, 32)})),
    "a name without PEFT's beginning": renamed("base_model.model.", ""),
    "a name with a path": renamed("layers.0", "layers/../0"),
    "an empty part of a name": renamed("self_attn.", "self_attn.."),
}


@pytest.mark.parametrize("attack", REFUSED_LORAS)
def test_a_hostile_lora_is_refused(tmp_path: Path, attack: str) -> None:
    sent = write_lora(tmp_path / "sent")
    assert admit_prompt(sent).adapter is not None
    REFUSED_LORAS[attack](sent)
    sign(sent)
    assert not verify(sent)["ok"]
    with pytest.raises(ArtifactRefused):
        admit_prompt(sent)


TABLE = "prompt_embeddings"


def with_six_tokens(folder: Path) -> None:
    """Give a prefix one more token than the prompt that it started from."""
    save_file({TABLE: torch.zeros(6, 64)}, folder / WEIGHTS)
    adapter(num_virtual_tokens=6)(folder)


REFUSED_PREFIXES: dict[str, Change] = {
    "another number of tokens": adapter(num_virtual_tokens=4),
    "true tokens": adapter(num_virtual_tokens=True),
    "no layers": adapter(num_layers=None),
    "one more layer": adapter(num_layers=3),
    "layers that are true": adapter(num_layers=True),
    "layers below zero": adapter(num_layers=-2, token_dim=-16),
    "heads of no width": adapter(num_attention_heads=32),
    "heads that do not divide the width": adapter(num_attention_heads=3),
    "no heads": adapter(num_attention_heads=0),
    "heads that are true": adapter(num_attention_heads=True),
    "another width": adapter(token_dim=8),
    "a width of another type": adapter(token_dim=16.0),
    "another adapter": adapter(peft_type="LORA"),
    "a prompt": adapter(peft_type="PROMPT_TUNING"),
    "an adapter with code": adapter(peft_type="BOFT"),
    "a list for the adapter": adapter(peft_type=["PREFIX_TUNING"]),
    "a projection": adapter(prefix_projection=True),
    "a number for the projection": adapter(prefix_projection=0),
    "a projection of another width": adapter(encoder_hidden_size=17),
    "two parts of a model": adapter(num_transformer_submodules=2),
    "first values of another kind": adapter(init_weights="zero"),
    "modules to save": adapter(modules_to_save=["lm_head"]),
    "code of the sender": adapter(auto_mapping={"base_model_class": "x"}),
    "a field that PEFT may learn": adapter(anything=1),
    "an adapter that is no object": put_text("adapter_config.json", "[]"),
    "a prompt of another form": put_text("prompt.safetensors", b"\x80\x04."),
    "a head as well": put_text("head.safetensors", b"\x80\x04."),
    "sparse values": replace_by_sparse(WEIGHTS, 1 << 40),
    "values through a link": replace_by_link(WEIGHTS),
    "no prompt beside it": lambda folder: (folder / "prompt.safetensors").unlink(),
    "more tokens than its prompt": with_six_tokens,
    "more tokens than its settings": change_factors(
        lambda t: t.update({TABLE: torch.zeros(6, 64)})
    ),
    "a table of three dimensions": change_factors(lambda t: t.update({TABLE: t[TABLE][None]})),
    "a huge value": change_factors(lambda t: t[TABLE].fill_(1e9)),
    "a value that is no number": change_factors(lambda t: t[TABLE].fill_(float("nan"))),
    "one more tensor": change_factors(lambda t: t.update({"more": torch.zeros(2, 32)})),
    "another name": renamed(TABLE, "prefix"),
}


@pytest.mark.parametrize("attack", REFUSED_PREFIXES)
def test_a_hostile_prefix_is_refused(tmp_path: Path, attack: str) -> None:
    sent = write_prefix(tmp_path / "sent")
    assert admit_prompt(sent).adapter is not None
    REFUSED_PREFIXES[attack](sent)
    sign(sent)
    assert not verify(sent)["ok"]
    with pytest.raises(ArtifactRefused) as refusal:
        admit_prompt(sent)
    # A rule has refused it, and no error of a library.
    assert "cannot be read (" not in str(refusal.value)


@pytest.mark.parametrize("write", [write_lora, write_prefix])
def test_a_public_prompt_has_no_adapter_of_peft(tmp_path: Path, write: Callable) -> None:
    sent = write(tmp_path / "sent")
    edit_json("post_dist.json", kind="public prompt")(sent)
    with pytest.raises(
        ArtifactRefused, match=r"prompt.safetensors is not a file of a public prompt"
    ):
        admit_prompt(sent, PUBLIC_PROMPT)


def test_a_claim_is_checked_wherever_a_prompt_comes_in(tmp_path: Path, main: Any) -> None:
    """What `verify` refuses, `transfer` and `evaluate` refuse too: they would repeat the claim."""
    run = tiny.write_run(tmp_path)
    sent = hostile(tmp_path, privacy(epsilon=0.01))
    for stage in ("transfer", "evaluate"):
        given = f"--set=inputs.source_prompt={sent}"
        student = f"--set=inputs.student={tmp_path / 'teacher'}"
        code, _, err = main(stage, run, given, student, "--trust-model")
        assert code == 4, err
        assert "it claims epsilon 0.0100, but its numbers give 0.4251" in err


def test_a_prompt_of_another_student_is_refused(tmp_path: Path, main: Any) -> None:
    run = tiny.write_run(tmp_path)
    student = tiny.write_student(tmp_path / "student")
    prompt = tmp_path / "prompt"
    provenance = Provenance("m", "", {"model": "1" * 64}, {})
    write_prompt(prompt, PromptContents(torch.zeros(5, 32), TASK, None), provenance, lambda _: None)
    given = (f"--set=inputs.student={student}", f"--set=inputs.source_prompt={prompt}")
    code, _, err = main("transfer", run, *given)
    assert code == 4
    assert "was tuned on another model" in err
    # The copy of the student that was admitted for it is gone too.
    assert not (tmp_path / "runs/tiny").exists()


def prompt_made_on(folder: Path, kind: ArtifactKind, tokenizer: str = "", **parents: str) -> Path:
    """Write a prompt whose vectors fit any tiny model, with a lineage."""
    lineage = {name.replace("_", " "): digest for name, digest in parents.items()}
    provenance = Provenance("m", tokenizer, lineage, {})
    contents = PromptContents(torch.zeros(5, 32), TASK, None)
    write_prompt(folder, contents, provenance, lambda _: None, kind)
    return folder


def test_a_prompt_of_another_model_is_refused_wherever_it_is_given(
    tmp_path: Path, main: Any
) -> None:
    """Student, large LLM and their relatives share width and tokenizer."""
    run = tiny.write_run(tmp_path)
    student = tiny.write_student(tmp_path / "student")
    own = parse_manifest(student / "post_dist.json").digest
    teacher = weights_of(tmp_path / "teacher")
    elsewhere = tiny.write_model(tmp_path / "elsewhere", "llama", seed=5)
    transferred = prompt_made_on(
        tmp_path / "transferred", "soft prompt", model=own, source_prompt="2" * 64, target=teacher
    )
    tuned = prompt_made_on(tmp_path / "tuned", "soft prompt", model=own)
    public = prompt_made_on(tmp_path / "public", PUBLIC_PROMPT, teacher="1" * 64, student="2" * 64)
    checked = {"student": student}
    cases = [
        ("transfer", checked | {"source_prompt": transferred}, "was transferred from"),
        (
            "transfer",
            {"student": elsewhere, "trust_model": "true", "source_prompt": transferred},
            "an LLM with other weights",
        ),
        (
            "evaluate",
            checked | {"source_prompt": tuned, "target_prompt": tuned},
            "was tuned on another model",
        ),
        ("tune", checked | {"public_prompt": public}, "was tuned on another model"),
    ]
    for stage, inputs, problem in cases:
        given = [f"--set=inputs.{name}={value}" for name, value in inputs.items()]
        code, _, err = main(stage, run, *given, "--set=evaluate.baselines=[]")
        assert code == 4, f"{stage}: {err}"
        assert problem in err


def test_a_prompt_of_the_large_llm_is_its_own_whatever_hidden_files_it_has(
    tmp_path: Path, main: Any
) -> None:
    """The hub's client writes hidden files into the folder of a model."""
    run = tiny.write_run(tmp_path)
    student = tiny.write_student(tmp_path / "student")
    own = parse_manifest(student / "post_dist.json").digest
    teacher = tmp_path / "teacher"
    words = tokenizer_fingerprint(load_tokenizer(teacher))
    source = prompt_made_on(tmp_path / "source", "soft prompt", words, model=own)
    whole = fingerprint(teacher)
    target = prompt_made_on(tmp_path / "target", "soft prompt", words, model=whole)
    (teacher / ".cache").mkdir()
    (teacher / ".cache" / "download").write_text("x")
    inputs = {"student": student, "source_prompt": source, "target_prompt": target}
    given = [f"--set=inputs.{name}={value}" for name, value in inputs.items()]
    code, _, err = main("evaluate", run, *given, "--set=evaluate.baselines=[]")
    assert code == 0, err


def test_a_refused_prompt_does_not_stop_the_prompts_of_others(tmp_path: Path, main: Any) -> None:
    run = tiny.write_run(tmp_path)
    student = f"--set=inputs.student={tmp_path / 'teacher'}"
    good = str(HONEST)
    changes = {
        "braces": task(template="{text"),
        "too long": task(max_length=5000),
        "two tokens": task(label_words=[["bad"], ["unbelievable"]]),
        "one word twice": task(label_words=[["bad"], ["bad"]]),
    }
    bad = [str(hostile(tmp_path / name, change)) for name, change in changes.items()]
    given = f"--set=inputs.source_prompt={json.dumps([*bad, good])}"
    code, _, err = main("transfer", run, given, student, "--trust-model", "--set=transfer.steps=1")
    assert code == 4, err
    assert "4 of 5 prompts were refused" in err
    assert all(f"{folder}: " in err for folder in bad)
    assert "do not fit into the context of the student" in err
    assert "the label word 'unbelievable' is" in err
    assert "share the token" in err
    (made,) = (tmp_path / "runs/tiny").glob("transfer-????????/artifact")
    assert f"the others are transferred: {made}" in err


def overflowing(folder: Path, model: Path) -> Path:
    """Write a prompt with a LoRA whose every value is within its bounds, and whose products not."""
    linears = read_facts(model).linears[0]
    shapes = {name: linears[name] for name in linears if ".mlp." in name}
    start = Lora.untrained(shapes, LoraSettings(r=200), seed=0)
    factors = {}
    for name, factor in start.factors.items():
        # All rows of the first factor point the same way, so that they add up.
        sign = factor[:1].sign() if name.endswith(DOWN) else torch.ones(1)
        factors[name] = (9.9e3 * sign).expand_as(factor).clone()
    contents = PromptContents(torch.zeros(5, 32), TASK, None, Lora(factors, 65_000))
    tokenizer = tokenizer_fingerprint(load_tokenizer(model))
    provenance = Provenance("m", tokenizer, {"model": fingerprint(model)}, {})
    write_prompt(folder, contents, provenance, lambda _: None)
    return folder


def test_a_prompt_that_overflows_does_not_stop_the_prompts_of_others(
    tmp_path: Path, main: Any
) -> None:
    run = tiny.write_run(tmp_path)
    student = tmp_path / "teacher"
    bad = overflowing(tmp_path / "bad", student)
    given = f"--set=inputs.source_prompt={json.dumps([str(bad), str(HONEST)])}"
    options = (f"--set=inputs.student={student}", "--trust-model", "--set=transfer.steps=6")
    code, _, err = main("transfer", run, given, *options)
    assert code == 4, err
    problem = "the outputs of the model with the prompt are not finite"
    assert f"1 of 2 prompts were refused: {bad}: {problem}" in err
    (made,) = (tmp_path / "runs/tiny").glob("transfer-????????/artifact")
    assert f"the others are transferred: {made}" in err
    (tmp_path / "texts.txt").write_text("the film is dull\n")
    code, _, err = main("predict", bad, tmp_path / "texts.txt", "--model", student)
    assert code == 4
    assert problem in err


def test_a_sender_cannot_choose_the_lineage_of_a_transferred_prompt(
    tmp_path: Path, main: Any
) -> None:
    run = tiny.write_run(tmp_path)
    weights = weights_of(tmp_path / "teacher")
    forged = {"model": "1" * 64, "source prompt": "2" * 64, "target": weights}
    sent = hostile(tmp_path, edit_json("post_dist.json", parents=forged))
    given = (f"--set=inputs.source_prompt={sent}", f"--set=inputs.student={tmp_path / 'teacher'}")
    code, _, err = main("transfer", run, *given, "--trust-model", "--set=transfer.steps=1")
    assert code == 0, err
    (made,) = (tmp_path / "runs/tiny").glob("transfer-????????/artifact")
    parents = read_prompt(made).manifest.parents
    assert parents["source prompt"] == parse_manifest(sent / "post_dist.json").digest
    assert parents["target"] == weights


def test_a_file_that_changes_while_it_is_read_is_never_used(tmp_path: Path) -> None:
    """A sender swaps the files all the time: what is admitted is what the manifest names."""
    outcomes, replaced = swap(300, tmp_path)
    assert set(outcomes) == {"admitted", "refused"}
    assert replaced > 300


def test_random_prompts_are_admitted_or_refused(tmp_path: Path) -> None:
    result = fuzz(prompts(tmp_path / "honest"), 300, seed=1, place=tmp_path)
    assert result.different == result.outcomes.total() == 300
    # The changes reach behind the first check, and most of them are hostile.
    assert 3 <= result.outcomes["admitted"] < 60
