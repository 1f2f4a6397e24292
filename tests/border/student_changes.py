"""Random changes of a student, and what an admitted student must be like."""

import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from border.hostile import replace_by_fifo, replace_by_link, replace_by_sparse
from border.random_changes import change_bytes, change_value, content_of, value

from post_dist.admission.door import admit_student
from post_dist.artifacts.manifest import FILE_NAME

WEIGHTS = "model.safetensors"
FAMILIES = ("llama", "gpt2", "roberta", "opt", "falcon", "gemma2", "qwen2")
_JSON_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json")
_INDEX = "model.safetensors.index.json"
_ADMITTED = {FILE_NAME, *_JSON_FILES, WEIGHTS}

DANGEROUS = (
    *("auto_map", "transformers_weights", "quantization_config", "_attn_implementation"),
    *("attn_implementation", "_experts_implementation", "num_labels", "torch_dtype", "dtype"),
    *("_name_or_path", "peft_config", "adapter_fuse", "text_config", "base_model_tp_plan"),
    *("rope_scaling", "rope_parameters", "layer_types", "tie_word_embeddings", "architectures"),
)
"""Fields of a configuration that transformers acts on."""

_NAMES = (
    *("adapter_config.json", "adapter_model.safetensors", "pytorch_model.bin", "modeling_x.py"),
    *("generation_config.json", "README.md", "chat_template.jinja", "merges.txt", "vocab.json"),
    *("model-00001-of-00002.safetensors", "tokenizer.model", "x\n\x1b[31m", _INDEX),
)
_CONTENTS = (b"", b"{}", b"\x80\x04.", b"[" * 5000, b"\x02\0\0\0\0\0\0\0{}", b"{{ x.__class__ }}")

_PARTS: tuple[dict[str, Any], ...] = (
    {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 300},
    {"type": "Replace", "pattern": {"Regex": "(a+)+b"}, "content": ""},
    {"type": "Replace", "pattern": {"Regex": ""}, "content": "x"},
    {"type": "Split", "pattern": {"Regex": "(.*)*x"}, "behavior": "Isolated", "invert": False},
    {"type": "Split", "pattern": {"String": ""}, "behavior": "Removed", "invert": True},
    {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
    {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "a" * 99}] * 9},
    {"type": "Sequence", "pretokenizers": [{"type": "ByteLevel"}] * 9},
    {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}},
    {"type": "RobertaProcessing", "sep": ["</s>", 1 << 31], "cls": ["<s>", 1]},
    {"type": "NFKD"},
    {"type": "Strip", "strip_left": True, "strip_right": True},
)
_PLACES = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
_PADDING = {
    "strategy": {"Fixed": 1 << 30},
    "direction": "Right",
    "pad_to_multiple_of": None,
    "pad_id": 0,
    "pad_type_id": 0,
    "pad_token": "<pad>",
}


def change_config(folder: Path, chance: random.Random) -> None:
    """Change a field of the configuration, or add one that transformers acts on."""
    name = chance.choice(DANGEROUS) if chance.random() < 0.3 else ""
    change_value(folder / "config.json", chance, name)


def scale_config(folder: Path, chance: random.Random) -> None:
    """Change a size in the configuration: what it describes is not in the files."""
    path = folder / "config.json"
    content = json.loads(content_of(path))
    sizes = [name for name, size in content.items() if type(size) is int and size > 1]
    for name in chance.sample(sizes, chance.randrange(1, 3)):
        content[name] *= chance.choice((2, 3, 1000, 1 << 20))
    path.write_text(json.dumps(content))


def change_tokenizer(folder: Path, chance: random.Random) -> None:
    """Change a value of a tokenizer, or put another part into it."""
    path = folder / chance.choice(("tokenizer.json", "tokenizer_config.json"))
    if path.name == "tokenizer_config.json" or chance.random() < 0.4:
        change_value(path, chance)
        return
    content = json.loads(content_of(path))
    if chance.random() < 0.1:
        content["padding"] = _PADDING
    else:
        content[chance.choice(_PLACES)] = chance.choice(_PARTS)
    path.write_text(json.dumps(content))


def change_header(folder: Path, chance: random.Random) -> None:
    """Change the header of the weights: a name, a shape, a type or a place."""
    path = folder / WEIGHTS
    content = content_of(path)
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    name = chance.choice(sorted(header))
    kind = chance.randrange(4)
    if kind == 0:
        header[chance.choice(("more", "__metadata__"))] = value(chance)
    elif kind == 1:
        header["lm_head.weight"] = header.pop(name)
    elif kind == 2:
        del header[name]
    else:
        header[name][chance.choice(sorted(header[name]))] = value(chance)
    raw = json.dumps(header).encode(errors="surrogatepass")
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + content[8 + length :])


def change_file(folder: Path, chance: random.Random) -> None:
    """Change bytes of a file."""
    change_bytes(folder / chance.choice((*_JSON_FILES, WEIGHTS)), chance)


def change_manifest(folder: Path, chance: random.Random) -> None:
    """Change what the manifest says."""
    change_value(folder / FILE_NAME, chance)


def change_names(folder: Path, chance: random.Random) -> None:
    """Add, remove or replace a file, or divide the weights with an index that may be wrong."""
    name = chance.choice((*_JSON_FILES, WEIGHTS))
    replace = chance.choice((replace_by_fifo, replace_by_link, lambda _: _remove(name)))
    kind = chance.randrange(5)
    if kind == 0:
        replace(name)(folder)
    elif kind == 1:
        replace_by_sparse(name, chance.getrandbits(42))(folder)
    elif kind == 2:
        (folder / WEIGHTS).rename(folder / "model-00001-of-00001.safetensors")
        places = {"model.norm.weight": chance.choice(("../x", "/dev/zero", WEIGHTS))}
        (folder / _INDEX).write_text(json.dumps({"weight_map": places}))
    else:
        content = chance.choice(_CONTENTS) + chance.randbytes(chance.randrange(4))
        (folder / chance.choice(_NAMES)).write_bytes(content)


def _remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


CHANGES = (
    *(change_config, change_config, scale_config, change_tokenizer, change_tokenizer),
    *(change_header, change_file, change_manifest, change_names),
)


def admit(folder: Path) -> None:
    """Admit a student, and check that only known files and fields have come in."""
    place = folder.parent / "admitted"
    try:
        admitted = admit_student(folder, place)
        names = {path.name for path in admitted.iterdir()}
        assert {name for name in names if not name.startswith("model-")} <= _ADMITTED | {_INDEX}
        config = json.loads((admitted / "config.json").read_text())
        assert not {"auto_map", "transformers_weights", "quantization_config"} & set(config)
        assert not any("attn_implementation" in name for name in config)
    finally:
        left = [path.name for path in place.iterdir()]
        assert not any("quarantine" in name for name in left), "nothing half-admitted stays"
        shutil.rmtree(place)
