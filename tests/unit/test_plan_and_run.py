"""`plan` says what the run does: facts from config.json, limits, cached signals and checkpoints."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, BloomConfig, MptConfig

from post_dist.errors import InputError
from post_dist.models.facts import facts_of, read_facts
from post_dist.models.load import load_whole
from post_dist.models.size import size_of
from post_dist.runtime import engine_checkpoint

CPU = torch.device("cpu")
FAMILIES = ("llama", "gpt2", "qwen2", "gemma2", "roberta", "opt", "mpt", "bloom", "falcon")
LIMITED = ("gpt2", "roberta", "opt", "mpt")
"""Families that have no positions beyond their context; the others only work badly there."""
ONE_GPU = ("--nodes=1", "--gpus-per-node=1", "--json")


def write_family(folder: Path, family: str) -> Path:
    """Write a model of a family, also of two that `tiny` does not know."""
    words = tiny.tokenizer(family)
    special = {"vocab_size": len(words), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if family == "mpt":
        config = MptConfig(
            **special, d_model=32, n_heads=4, n_layers=4, expansion_ratio=2, max_seq_len=256
        )
    elif family == "bloom":
        config = BloomConfig(**special, hidden_size=32, n_layer=4, n_head=4)
    else:
        return tiny.write_model(folder, family)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family(tmp_path_factory.mktemp("family") / request.param, request.param)


def planned(main: Callable, run: Path, *options: str) -> dict:
    _, out, err = main("plan", run, *ONE_GPU, *options)
    assert err == ""
    return json.loads(out)


def test_facts_without_weights_are_those_of_the_loaded_model(folder: Path) -> None:
    model = load_whole(folder, "fp32", CPU)
    assert read_facts(folder) == facts_of(model)
    size = size_of(folder)
    assert size.facts == facts_of(model)
    assert sorted(size.weights) == sorted(parameter.numel() for parameter in model.parameters())
    assert size.shares_prompt == model.shares_prompt


def test_a_model_reads_as_many_tokens_as_its_facts_promise(folder: Path) -> None:
    model = load_whole(folder, "fp32", CPU)
    context = read_facts(folder).context_length
    if folder.name == "bloom":
        assert context == float("inf")
        return
    assert context == {"mpt": 256, "roberta": 129, "falcon": 2048}.get(folder.name, 128)

    def read(length: float) -> None:
        with torch.no_grad():
            model(torch.full((1, int(length)), 5))

    read(context)
    if folder.name in LIMITED:
        with pytest.raises((IndexError, RuntimeError)):
            read(context + 1)


@pytest.mark.parametrize("family", ["roberta", "mpt"])
def test_plan_lists_what_the_run_refuses(tmp_path: Path, main: Callable, family: str) -> None:
    run = tiny.write_run(tmp_path, "roberta" if family == "roberta" else "llama")
    if family == "mpt":
        for file in (tmp_path / "teacher").iterdir():
            file.unlink()
        write_family(tmp_path / "teacher", family)
    context = int(read_facts(tmp_path / "teacher").context_length)
    for length in (context, context + 1):
        settings = (
            f"--set=corpus.sequence_length={length}",
            "--set=corpus.held_out_sequences=1",
            f"--set=tune.num_virtual_tokens={length - 48}",
        )
        conflicts = planned(main, run, *settings)["conflicts"]
        too_long = [each for each in conflicts if "context" in each]
        assert bool(too_long) == (length > context), conflicts
    code, _, err = main("distill", run, *settings)
    assert code == 2
    message = f"corpus.sequence_length {context + 1} exceeds the teacher's context of {context}"
    assert message in err
    assert any(f"distill: {message}" in each for each in conflicts)
    assert any("tune: a prompt of" in each for each in conflicts)
    assert any("transfer: a prompt of" in each for each in conflicts)


def test_a_model_that_scales_its_logits_is_refused_without_weights(tmp_path: Path) -> None:
    granite = tiny.write_model(tmp_path / "granite", "granite")
    for read in (read_facts, size_of):
        with pytest.raises(InputError, match="a granite changes its logits"):
            read(granite)
    with pytest.raises(InputError, match="changes its logits"):
        load_whole(granite, "fp32", CPU)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_cached_signals_are_as_large_as_planned(
    tmp_path: Path, main: Callable, family: str
) -> None:
    """Gemma 2 caps its logits: hidden states are kept where others keep a product and entropy."""
    run = tiny.write_run(tmp_path, family)
    settings = (
        "--set=distill.cache=hidden",
        "--set=distill.alpha_cos=1",
        "--set=distill.steps=2",
        # 16 sequences to train on, and 8 held out. A file has room for more than the steps read.
        "--set=corpus.max_tokens=768",
        f"--output={tmp_path / 'runs'}",
    )
    stage = planned(main, run, *settings)["stages"][0]
    code, _, err = main("distill", run, *settings)
    assert code == 0, err
    kept = 0
    for file in tmp_path.glob("runs/**/teacher-signals-*/*/*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():
                tensor = tensors.get_tensor(name)
                kept += tensor.numel() * tensor.element_size()
    assert kept == 16 * 32 * {"llama": 2 * 32 * 4 + 4, "gemma2": 32 * 4}[family]
    assert stage["teacher_signals_gib"] * 2**30 == pytest.approx(kept)


@pytest.mark.parametrize(("precision", "zero_stage"), [("fp32", 0), ("bf16", 1), ("bf16", 2)])
def test_a_checkpoint_is_as_large_as_planned(
    tmp_path: Path,
    main: Callable,
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
    zero_stage: int,
) -> None:
    sizes = []
    save_file = engine_checkpoint.save_file

    def save_and_measure(tensors: dict[str, torch.Tensor], path: Path) -> None:
        save_file(tensors, path)
        with safe_open(path, framework="pt") as saved:
            pieces = [saved.get_tensor(name) for name in saved.keys() if name != "adam_step"]
        sizes.append(sum(piece.numel() * piece.element_size() for piece in pieces))
        header = path.stat().st_size - sizes[-1]
        assert 0 < header < 20_000, "nothing else of any size is in the file"

    monkeypatch.setattr(engine_checkpoint, "save_file", save_and_measure)
    run = tiny.write_run(tmp_path)
    settings = (
        f"--set=engine.precision={precision}",
        f"--set=engine.zero_stage={zero_stage}",
        "--set=distill.steps=3",
        f"--output={tmp_path / 'runs'}",
    )
    code, _, err = main("distill", run, *settings)
    assert code == 0, err
    stage = planned(main, run, *settings)["stages"][0]
    assert sizes
    assert stage["checkpoint_gib"] * 2**30 == pytest.approx(sizes[0])
