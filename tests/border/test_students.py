"""Students of another party: what comes in, what does not, and what is left of a configuration."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from border.fuzz import fuzz, students
from border.hostile import (
    Change,
    edit_json,
    put_text,
    replace_by_fifo,
    replace_by_link,
    replace_by_sparse,
    sign,
)
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from post_dist.admission.door import admit_student
from post_dist.artifacts.manifest import FILE_NAME
from post_dist.errors import ArtifactRefused
from post_dist.models.load import load_tokenizer, tokenizer_fingerprint
from post_dist.verify import verify

TABLES = ("model.embed_tokens.weight", "lm_head.weight")
FAMILIES = ("llama", "gpt2", "roberta", "opt", "falcon", "gemma2", "qwen2")


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_student(tmp_path_factory.mktemp("border") / "student")


def hostile(honest: Path, folder: Path, *changes: Change) -> Path:
    student = shutil.copytree(honest, folder / "sent")
    for change in changes:
        change(student)
    sign(student)
    return student


@pytest.mark.parametrize("family", [*FAMILIES, *tiny.MIXTURES])
def test_an_honest_student_comes_in_with_equal_weights(tmp_path: Path, family: str) -> None:
    sent = tiny.write_student(tmp_path / "student", family)
    assert verify(sent)["ok"], verify(sent)
    admitted = admit_student(sent, tmp_path / "place")
    assert admitted.parent == tmp_path / "place"
    assert admitted.stat().st_mode & 0o077 == 0
    ours = load_file(admitted / "model.safetensors")
    theirs = load_file(sent / "model.safetensors")
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    wanted = AutoConfig.from_pretrained(sent).to_dict()
    found = AutoConfig.from_pretrained(admitted).to_dict()
    other = {name for name in wanted if wanted[name] != found.get(name)}
    # The tiny OPT and Falcon have a width of the MLP that these families do not read.
    assert other <= {"transformers_version", "_name_or_path", "intermediate_size"}
    # A second command finds it again.
    assert admit_student(sent, tmp_path / "place") == admitted
    assert len(list((tmp_path / "place").iterdir())) == 1


def change_tensors(change: Callable[[dict], object]) -> Change:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return apply


def index_to(place: str) -> Change:
    """Name a file outside the folder as the place of all weights."""

    def apply(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
        names = load_file(folder.parent / "outside.safetensors")
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, place)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return apply


def in_two_files(folder: Path) -> None:
    """Divide the weights into two files, with a right index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = {}
    names = sorted(tensors)
    for number, chosen in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in chosen}, folder / file)
        places |= dict.fromkeys(chosen, file)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def swap_places(folder: Path) -> None:
    """Divide the weights, with an index that names the wrong file of each."""
    in_two_files(folder)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    other = {first: second, second: first}
    index["weight_map"] = {name: other[file] for name, file in index["weight_map"].items()}
    path.write_text(json.dumps(index))


def endless_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 62) + b"{}")


def growing_normalizer(folder: Path) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    steps = [{"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 500}] * 3
    content["normalizer"] = {"type": "Sequence", "normalizers": steps}
    path.write_text(json.dumps(content))


def untied_on_paper(folder: Path) -> None:
    """Claim a table of 200 GB that no file holds, because it is tied to one that is not there."""
    config = {"tie_word_embeddings": True, "vocab_size": 1 << 31}
    edit_json("config.json", **config)(folder)
    change_tensors(lambda tensors: [tensors.pop(name) for name in TABLES])(folder)


def bind_tokenizer(change: Change) -> Change:
    """Return a change of a tokenizer that the manifest names."""

    def apply(folder: Path) -> None:
        change(folder)
        edit_json(FILE_NAME, tokenizer=tokenizer_fingerprint(load_tokenizer(folder)))(folder)

    return apply


def slow_pattern(folder: Path) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    pattern = {"Regex": "(a+)+b"}
    content["normalizer"] = {"type": "Replace", "pattern": pattern, "content": ""}
    path.write_text(json.dumps(content))


REFUSED: dict[str, Change] = {
    "weights through a link": replace_by_link("model.safetensors"),
    "configuration through a link": replace_by_link("config.json"),
    "manifest through a link": replace_by_link(FILE_NAME),
    "weights in a FIFO": replace_by_fifo("model.safetensors"),
    "tokenizer in a FIFO": replace_by_fifo("tokenizer.json"),
    "sparse weights": replace_by_sparse("model.safetensors", 1 << 41),
    "sparse weights of a size that models have": replace_by_sparse("model.safetensors", 1 << 37),
    "sparse configuration": replace_by_sparse("config.json", 1 << 30),
    "sparse tokenizer": replace_by_sparse("tokenizer.json", 1 << 35),
    "a folder": lambda folder: (folder / "sub").mkdir(),
    "a pickle": put_text("pytorch_model.bin", b"\x80\x04."),
    "an adapter": put_text("adapter_config.json", '{"peft_type": "BOFT"}'),
    "weights of an adapter": put_text("adapter_model.safetensors", b"\x02\0\0\0\0\0\0\0{}"),
    "code": put_text("modeling_llama.py", "import os"),
    "a name with a line break": put_text("x\n\x1b[31mok: True", "x"),
    "index to a file outside": index_to("../outside.safetensors"),
    "index to an absolute path": index_to("/dev/zero"),
    "index beside one file": put_text("model.safetensors.index.json", '{"weight_map": {}}'),
    "index to the other file": swap_places,
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "no tokenizer": lambda folder: (folder / "tokenizer.json").unlink(),
    "an endless header": endless_header,
    "a missing weight": change_tensors(lambda tensors: tensors.popitem()),
    "another weight": change_tensors(lambda tensors: tensors.update(more=torch.zeros(2))),
    "another shape": change_tensors(
        lambda tensors: tensors.update({"model.norm.weight": torch.zeros(33)})
    ),
    "another type": change_tensors(
        lambda tensors: tensors.update({"model.norm.weight": torch.zeros(32, dtype=torch.int8)})
    ),
    "a value that is not finite": change_tensors(
        lambda tensors: tensors["model.norm.weight"].fill_(float("nan"))
    ),
    "an unknown family": edit_json("config.json", model_type="evil"),
    "a family of mixtures": edit_json("config.json", model_type="mixtral"),
    "a class for something else": edit_json(
        "config.json", architectures=["LlamaForSequenceClassification"]
    ),
    "two classes": edit_json("config.json", architectures=["LlamaForCausalLM"] * 2),
    "a million layers": edit_json("config.json", num_hidden_layers=10**6),
    "layers as text": edit_json("config.json", num_hidden_layers="2"),
    "no layers": edit_json("config.json", num_hidden_layers=0),
    "heads that do not divide": edit_json("config.json", num_attention_heads=5),
    "no heads": edit_json("config.json", num_attention_heads=0),
    "a huge width": edit_json("config.json", hidden_size=1 << 40),
    "another width": edit_json("config.json", hidden_size=64),
    "an unknown activation": edit_json("config.json", hidden_act="os.system"),
    "an activation with a path": edit_json("config.json", hidden_act="../x"),
    "an unknown type": edit_json("config.json", dtype="float8_e4m3fn"),
    "rotary parameters as a list": edit_json("config.json", rope_parameters=[1, 2]),
    "an unknown rotary type": edit_json("config.json", rope_parameters={"rope_type": "x"}),
    "a configuration that is no JSON": put_text("config.json", "{"),
    "a configuration in UTF-16": put_text("config.json", "{}".encode("utf-16")),
    "a deep configuration": put_text("config.json", '{"a":' * 5000 + "1" + "}" * 5000),
    "a key twice": put_text("config.json", '{"model_type": "llama", "model_type": "gpt2"}'),
    "not a number": put_text("config.json", '{"model_type": "llama", "rms_norm_eps": NaN}'),
    "a tokenizer that is no JSON": put_text("tokenizer.json", "{"),
    "a tokenizer that multiplies its input": growing_normalizer,
    "another tokenizer": lambda folder: shutil.copy(
        tiny.write_model(folder.parent / "other", "llama", vocabulary=500) / "tokenizer.json",
        folder / "tokenizer.json",
    ),
    "a class of tokenizers with a path": edit_json("tokenizer_config.json", tokenizer_class="../x"),
    "a tokenizer of characters": bind_tokenizer(
        edit_json("tokenizer_config.json", tokenizer_class="ByT5Tokenizer")
    ),
    "a token without an embedding": bind_tokenizer(
        edit_json("tokenizer_config.json", pad_token="<more>")
    ),
    "a pattern that needs endless time": slow_pattern,
    "a lineage without the teacher": edit_json(FILE_NAME, parents={}),
    "a token as a number": edit_json("tokenizer_config.json", bos_token=5),
}


@pytest.mark.parametrize("attack", REFUSED)
def test_a_hostile_student_is_refused_with_one_line(
    honest: Path, tmp_path: Path, attack: str
) -> None:
    sent = hostile(honest, tmp_path, REFUSED[attack])
    result = verify(sent)
    assert not result["ok"]
    for problem in result["problems"]:
        # A name may hold anything; the terminal gets none of it.
        assert all(line.isprintable() for line in problem.splitlines())
    with pytest.raises(ArtifactRefused):
        admit_student(sent, tmp_path / "place")
    assert list((tmp_path / "place").iterdir()) == [], "nothing half-admitted stays"


def test_no_memory_is_needed_for_what_was_not_sent(honest: Path, tmp_path: Path) -> None:
    """A table that is in no file is found missing before anything is loaded."""
    sent = hostile(honest, tmp_path, untied_on_paper)
    (problem,) = verify(sent)["problems"]
    assert "the weights lack model.embed_tokens.weight" in problem


def test_an_mpt_whose_table_of_positions_fills_the_memory_is_refused(tmp_path: Path) -> None:
    """Each of its passes makes a number for each head and for each position that it may have."""
    sent = tiny.write_student(tmp_path / "student", "mpt")
    assert verify(sent)["ok"], verify(sent)
    edit_json("config.json", max_seq_len=1 << 24)(sent)
    sign(sent)
    (problem,) = verify(sent)["problems"]
    assert "needs too much memory" in problem


DANGEROUS = {
    "auto_map": {"AutoModelForCausalLM": "evil.Model"},
    "transformers_weights": "adapter_model.bin",
    "quantization_config": {"quant_method": "gptq", "bits": 4},
    "_attn_implementation": "org/repo@rev",
    "attn_implementation": "org/repo@rev",
    "_experts_implementation": "org/repo",
    "num_labels": 10**9,
    "torch_dtype": "evil",
    "is_encoder_decoder": True,
    "_name_or_path": "/etc/passwd",
    "peft_config": {"peft_type": "BOFT"},
    "anything_else": [1] * 5000,
}


DANGEROUS_TO_TOKENIZERS = {
    "auto_map": {"AutoTokenizer": ["evil.T", None]},
    "fast_tokenizer_files": ["../outside.json"],
    "tokenizer_file": "/etc/passwd",
    "chat_template": "{{ x }}",
}


def fields_of_others(folder: Path) -> None:
    """Add the fields of a configuration and of a tokenizer that transformers acts on."""
    edit_json("config.json", **DANGEROUS)(folder)
    edit_json("tokenizer_config.json", **DANGEROUS_TO_TOKENIZERS)(folder)


def test_no_field_that_a_family_does_not_have_comes_in(honest: Path, tmp_path: Path) -> None:
    sent = hostile(honest, tmp_path, fields_of_others)
    admitted = admit_student(sent, tmp_path / "place")
    written = json.loads((admitted / "config.json").read_text())
    assert not set(DANGEROUS) & set(written)
    wanted = json.loads((honest / "config.json").read_text())
    del wanted["transformers_version"]
    assert written == wanted
    written = json.loads((admitted / "tokenizer_config.json").read_text())
    assert not set(DANGEROUS_TO_TOKENIZERS) & set(written)


def test_weights_in_several_files_come_in(honest: Path, tmp_path: Path) -> None:
    sent = hostile(honest, tmp_path, in_two_files)
    assert verify(sent)["ok"]


def test_a_student_of_one_s_own_run_that_was_changed_is_noticed(tmp_path: Path, main: Any) -> None:
    run = tiny.write_run(tmp_path)
    assert main("distill", run)[0] == 0
    (student,) = (tmp_path / "runs/tiny").glob("distill-????????/artifact")
    put_text("generation_config.json", "{}")(student)
    code, _, err = main("tune", run)
    assert code == 4
    assert "generation_config.json is not the file that was written" in err


def test_random_students_are_admitted_or_refused(tmp_path: Path) -> None:
    result = fuzz(students(tmp_path, ("llama", "roberta")), 40, seed=1, place=tmp_path)
    assert result.different == result.outcomes.total() == 40
    assert 2 <= result.outcomes["admitted"] < 20
