"""Send random prompts through the door: each is admitted or refused, and nothing else happens.

    python tests/border/fuzz.py --prompts 100000

A prompt is an honest one with one to three changes: bytes of a file, values of a JSON file, or the
header of the weights. Its manifest agrees with it. The script prints how many different prompts it
made, and fails at the first one that raises an error of another kind, takes over five seconds, or
is admitted with values that no honest prompt has.
"""

import argparse
import hashlib
import json
import random
import shutil
import struct
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from border.hostile import sign

from post_dist.admission.door import admit_prompt
from post_dist.artifacts.manifest import FILE_NAME
from post_dist.artifacts.prompt import SoftPromptArtifact
from post_dist.errors import ArtifactRefused

HONEST = Path(__file__).parents[1] / "data/artifacts_0_1_0/source_prompt"
WEIGHTS = "adapter_model.safetensors"
JSON_FILES = ("task.json", "adapter_config.json", "privacy.json", FILE_NAME)
_SECONDS = 5.0

_SCALARS = (None, True, False, 0, 1, -1, 2, 5, 31, 1 << 31, 1 << 64, 0.5, -0.5, 1e-300, 1e300)
_TEXTS = ("", " ", "{text}", "{mask}", "{text}{text}", "\ud800", "\n\x1b[31m", "é" * 40, "../x")
_NESTED: tuple[Any, ...] = ([], {}, [[]], [None], {"a": 1}, [["bad"], ["good"]], ["a"] * 50)


def value(chance: random.Random) -> Any:
    """Return a JSON value of any kind."""
    return chance.choice(
        (*_SCALARS, *_TEXTS, *_NESTED, chance.random() * 10, chance.getrandbits(40))
    )


def change_json(folder: Path, chance: random.Random) -> None:
    """Replace, remove or add a value of a JSON file, at its top or one level below."""
    path = folder / chance.choice(JSON_FILES)
    try:
        content = json.loads(path.read_bytes())
    except ValueError:  # an earlier change has damaged it
        return
    if not isinstance(content, dict) or not content:
        return
    name = chance.choice([*content, "more"])
    inner = content.get(name)
    if isinstance(inner, dict) and inner and chance.random() < 0.5:
        inner[chance.choice([*inner, "more"])] = value(chance)
    elif chance.random() < 0.1:
        content.pop(name, None)
    else:
        content[name] = value(chance)
    path.write_text(json.dumps(content))


def change_bytes(folder: Path, chance: random.Random) -> None:
    """Flip, cut or repeat bytes of a file."""
    path = folder / chance.choice(("task.json", "adapter_config.json", "privacy.json", WEIGHTS))
    content = bytearray(path.read_bytes())
    place = chance.randrange(len(content) + 1)
    kind = chance.randrange(3)
    if kind == 0 and place < len(content):
        content[place] = chance.randrange(256)
    elif kind == 1:
        del content[place : place + chance.randrange(1, 40)]
    else:
        content[place:place] = content[place : place + chance.randrange(1, 40)]
    path.write_bytes(content)


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


def make(folder: Path, chance: random.Random) -> str:
    """Make a hostile prompt, and return a digest of all its files."""
    shutil.copytree(HONEST, folder)
    for _ in range(chance.randrange(1, 4)):
        chance.choice((change_json, change_json, change_bytes, change_header))(folder, chance)
    # The manifest itself may have become unreadable.
    with suppress(ValueError, TypeError):
        sign(folder)
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def check_admitted(prompt: SoftPromptArtifact) -> None:
    """Check that an admitted prompt is one that somebody may have made honestly."""
    assert prompt.embeddings.isfinite().all()
    assert prompt.embeddings.norm(dim=1).max() <= 1e4
    assert prompt.task.template.count("{text}") == 1
    assert len(prompt.task.label_words) >= 2 or prompt.task.max_response_length > 0
    assert all(word.strip() for words in prompt.task.label_words for word in words)
    if prompt.epsilon is not None:
        assert 0 < prompt.epsilon < float("inf")
    json.dumps(prompt.task.template).encode()
    prompt.task.template.encode()


def fuzz(prompts: int, seed: int, place: Path) -> tuple[int, Counter]:
    """Make prompts and send them through the door.

    Returns:
        The number of different ones, and how many were admitted and refused.
    """
    chance = random.Random(seed)
    seen: set[str] = set()
    outcomes: Counter = Counter()
    folder = place / "sent"
    while len(seen) < prompts:
        digest = make(folder, chance)
        if digest not in seen:
            seen.add(digest)
            start = time.monotonic()
            try:
                check_admitted(admit_prompt(folder))
                outcomes["admitted"] += 1
                said = ""
            except ArtifactRefused as error:
                outcomes["refused"] += 1
                said = str(error).splitlines()[0]
            assert said.isprintable(), repr(said)
            assert time.monotonic() - start < _SECONDS, "too slow"
        shutil.rmtree(folder)
    return len(seen), outcomes


def main() -> None:
    """Print how many different prompts were made, and what became of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        made, outcomes = fuzz(options.prompts, options.seed, Path(place))
    print(f"{made} different prompts: {dict(outcomes)}, and nothing else happened")


if __name__ == "__main__":
    main()
