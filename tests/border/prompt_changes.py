"""Random changes of a prompt, and what an admitted prompt must be like."""

import json
import random
import struct
from pathlib import Path
from typing import Any

from border.random_changes import change_bytes, change_value, value

from post_dist.admission.door import admit_prompt
from post_dist.artifacts.manifest import FILE_NAME

HONEST = Path(__file__).parents[1] / "data/artifacts_0_1_0/source_prompt"
WEIGHTS = "adapter_model.safetensors"


def _json_files(folder: Path) -> list[str]:
    names = ("task.json", "adapter_config.json", "privacy.json")
    return [name for name in names if (folder / name).exists()]


def change_json(folder: Path, chance: random.Random) -> None:
    """Change a value of a JSON file."""
    change_value(folder / chance.choice((*_json_files(folder), FILE_NAME)), chance)


def change_file(folder: Path, chance: random.Random) -> None:
    """Change bytes of a file."""
    change_bytes(folder / chance.choice((*_json_files(folder), WEIGHTS)), chance)


def change_header(folder: Path, chance: random.Random) -> None:
    """Write the weights with another header."""
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


CHANGES = (change_json, change_json, change_file, change_header)
"""A change that stands twice here is made twice as often."""


def admit(folder: Path) -> None:
    """Admit a prompt, and check that somebody may have made it honestly."""
    prompt = admit_prompt(folder)
    assert prompt.embeddings.isfinite().all()
    assert prompt.embeddings.norm(dim=1).max() <= 1e4
    assert prompt.task.template.count("{text}") == 1
    assert len(prompt.task.label_words) >= 2 or prompt.task.max_response_length > 0
    assert all(word.strip() for words in prompt.task.label_words for word in words)
    if prompt.epsilon is not None:
        assert 0 < prompt.epsilon < float("inf")
    json.dumps(prompt.task.template).encode()
    prompt.task.template.encode()
