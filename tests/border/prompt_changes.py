"""Random changes of a prompt, and what an admitted prompt must be like."""

import json
import random
import struct
from pathlib import Path
from typing import Any

import torch
from border.random_changes import change_bytes, change_value, value

from post_dist.admission.door import admit_prompt
from post_dist.artifacts.lora import Lora
from post_dist.artifacts.manifest import FILE_NAME
from post_dist.artifacts.prefix import Prefix
from post_dist.artifacts.prompt import PromptContents, Provenance, write_prompt
from post_dist.artifacts.task import PromptTask
from post_dist.config.stages import LoraSettings

HONEST = Path(__file__).parents[1] / "data/artifacts_0_1_0/source_prompt"
WEIGHTS = "adapter_model.safetensors"
PROMPT = "prompt.safetensors"
"""The prompt of a LoRA or a prefix. Its file is there if there is one of them."""


def _json_files(folder: Path) -> list[str]:
    names = ("task.json", "adapter_config.json", "privacy.json")
    return [name for name in names if (folder / name).exists()]


def _weights(folder: Path) -> list[str]:
    return [name for name in (WEIGHTS, PROMPT) if (folder / name).exists()]


def write_lora(folder: Path) -> Path:
    """Write an honest prompt with a LoRA behind it."""
    task = PromptTask("Review: {text} It was", (("bad",), ("good",)), 48, False, "Classify")
    shapes = {f"model.layers.{layer}.self_attn.q_proj": (32, 32) for layer in range(2)}
    lora = Lora.untrained(shapes, LoraSettings(r=2), seed=0)
    contents = PromptContents(torch.zeros(5, 32), task, None, lora)
    write_prompt(folder, contents, Provenance("m", "", {"model": "1" * 64}, {}), lambda _: None)
    return folder


def write_prefix(folder: Path) -> Path:
    """Write an honest prefix with the prompt that it started from."""
    task = PromptTask("Review: {text} It was", (("bad",), ("good",)), 48, False, "Classify")
    prefix = Prefix((torch.ones(2, 5, 8), torch.zeros(2, 5, 8)) * 2)
    contents = PromptContents(torch.zeros(5, 32), task, None, prefix)
    write_prompt(folder, contents, Provenance("m", "", {"model": "1" * 64}, {}), lambda _: None)
    return folder


def change_json(folder: Path, chance: random.Random) -> None:
    """Change a value of a JSON file."""
    change_value(folder / chance.choice((*_json_files(folder), FILE_NAME)), chance)


def change_file(folder: Path, chance: random.Random) -> None:
    """Change bytes of a file."""
    change_bytes(folder / chance.choice((*_json_files(folder), *_weights(folder))), chance)


def change_header(folder: Path, chance: random.Random) -> None:
    """Write the weights of a prompt with another header, or change that of an adapter."""
    if (folder / PROMPT).exists():
        change_lora_header(folder / WEIGHTS, chance)
        return
    entry: dict[str, Any] = {"dtype": "F32", "shape": [5, 32], "data_offsets": [0, 640]}
    shapes = ([5, 32.0], [True, 160], [160], [1, 5, 32], [0, 640.0], [-4, 636])
    name = chance.choice([*entry, "more"])
    entry[name] = chance.choice((*shapes, "F16", ["F32"], value(chance)))
    header: dict[str, Any] = {"prompt_embeddings": entry}
    if chance.random() < 0.3:
        header[chance.choice(("__metadata__", "other"))] = value(chance)
    encoding = chance.choice(("utf-8", "utf-8", "utf-8", "utf-16", "utf-32"))
    text = json.dumps(header, ensure_ascii=chance.random() < 0.8)
    raw = text.encode(encoding, errors="surrogatepass")
    length = len(raw) if chance.random() < 0.9 else chance.getrandbits(chance.randrange(1, 64))
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", length) + raw + bytes(640))


def change_lora_header(path: Path, chance: random.Random) -> None:
    """Change an entry or a name in the header of a LoRA or a prefix, and keep its data."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    name = chance.choice(sorted(header))
    changed = header.pop(name)
    if isinstance(changed, dict) and chance.random() < 0.7:
        key = chance.choice(["dtype", "shape", "data_offsets", "more"])
        changed[key] = chance.choice(([2, 32], [32, 2], [64], [1, 2, 32], [True, 64], "F16"))
    else:
        places = (".lora_A", ".lora_B", "base_model.model.", ".weight", "layers.1")
        name = name.replace(chance.choice(places), chance.choice((*places, "..", "\ud800")))
    text = json.dumps({name: changed, **header}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


CHANGES = (change_json, change_json, change_file, change_header)
"""A change that stands twice here is made twice as often."""


def admit(folder: Path) -> None:
    """Admit a prompt, and check that somebody may have made it honestly."""
    prompt = admit_prompt(folder)
    assert prompt.embeddings.isfinite().all()
    assert prompt.embeddings.norm(dim=1).max() <= 1e4
    if isinstance(prompt.adapter, Prefix):
        assert prompt.adapter.num_virtual_tokens == len(prompt.embeddings)
        assert all(part.isfinite().all() for part in prompt.adapter.keys_and_values)
    elif prompt.adapter is not None:
        assert isinstance(prompt.adapter, Lora)
        assert 0 < prompt.adapter.scale <= 1 << 16
        for layer in prompt.adapter.layers:
            down, up = prompt.adapter.pair(layer)
            assert len(down) == up.shape[1] == prompt.adapter.rank
            assert down.isfinite().all()
            assert up.isfinite().all()
    assert prompt.task.template.count("{text}") == 1
    assert len(prompt.task.label_words) >= 2 or prompt.task.max_response_length > 0
    assert all(word.strip() for words in prompt.task.label_words for word in words)
    if prompt.epsilon is not None:
        assert 0 < prompt.epsilon < float("inf")
    json.dumps(prompt.task.template).encode()
    prompt.task.template.encode()
