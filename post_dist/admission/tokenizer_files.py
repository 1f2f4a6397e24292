"""Rebuild a tokenizer's settings, and try the tokenizer in a process with limits.

A normalizer may multiply its input, and a vocabulary may be larger than the model's embeddings. So
the tokenizer first runs in a process of its own, with a limit of time and memory.
"""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from post_dist.artifacts.strict_json import read_object
from post_dist.errors import ArtifactRefused

_SECONDS = 30
_MEMORY_BYTES = 4 << 30
_TEXT_BYTES = 1 << 10
_TOKENS = {f"{name}_token" for name in ("bos", "eos", "pad", "unk", "mask", "cls", "sep")}
_PLAIN = {
    "add_prefix_space": bool,
    "add_bos_token": bool,
    "add_eos_token": bool,
    "clean_up_tokenization_spaces": bool,
    "padding_side": str,
    "truncation_side": str,
}
_TOKEN_FLAGS = {"lstrip", "rstrip", "normalized", "single_word", "special"}
_CLASS = re.compile(r"[A-Za-z0-9]{1,64}")

_TRIAL = """
import resource, sys
from tokenizers import Tokenizer
memory, seconds = int(sys.argv[2]), int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
tokenizer = Tokenizer.from_file(sys.argv[1])
for text in ("", "Review: a film, it was great", "L'\u00e9t\u00e9 1998", "a" * 500, "  \\n\\t0@#"):
    ids = tokenizer.encode(text).ids
    # A byte makes a few tokens at most.
    if len(ids) > 4 * len(text.encode()) + 8 or max(ids, default=0) >= int(sys.argv[4]):
        sys.exit(9)
"""
_DOES_NOT_FIT = 9


def rebuild_tokenizer_config(path: Path) -> None:
    """Check a tokenizer_config.json and replace it by one that holds the known fields alone.

    Raises:
        ArtifactRefused: a field has another type.
    """
    fields = read_object(path)
    rebuilt: dict[str, Any] = {}
    for name, value in fields.items():
        if name in _TOKENS and value is not None:
            rebuilt[name] = _token(name, value)
        if isinstance(value, _PLAIN.get(name, ())):
            rebuilt[name] = value
    length = fields.get("model_max_length")
    if isinstance(length, int) and length > 0:
        rebuilt["model_max_length"] = length
    class_name = fields.get("tokenizer_class", "PreTrainedTokenizerFast")
    if not isinstance(class_name, str) or not _CLASS.fullmatch(class_name):
        raise ArtifactRefused("tokenizer_config.json: tokenizer_class is no name of a class")
    rebuilt["tokenizer_class"] = class_name
    path.write_text(json.dumps(rebuilt, indent=2) + "\n")


def _token(name: str, value: Any) -> str | dict[str, Any]:
    """Return a special token: its text, or its text with settings."""
    settings = value if isinstance(value, dict) else {"content": value}
    text = settings.get("content")
    if not isinstance(text, str) or len(text.encode()) > _TEXT_BYTES:
        raise ArtifactRefused(f"tokenizer_config.json: {name} is no token")
    if not isinstance(value, dict):
        return text
    flags = {flag: settings[flag] for flag in _TOKEN_FLAGS & set(settings)}
    if not all(isinstance(flag, bool) for flag in flags.values()):
        raise ArtifactRefused(f"tokenizer_config.json: {name} has settings of another type")
    return {"__type": "AddedToken", "content": text, **flags}


def try_tokenizer(path: Path, vocabulary: int) -> None:
    """Load a tokenizer.json in another process, and encode a few texts.

    Args:
        path: the file.
        vocabulary: number of tokens of the model.

    Raises:
        ArtifactRefused: it cannot be loaded within the limits, or its tokens do not fit the model.
    """
    command = [sys.executable, "-I", "-c", _TRIAL]
    limits = [str(path), str(_MEMORY_BYTES), str(_SECONDS), str(vocabulary)]
    try:
        done = subprocess.run(
            command + limits,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=2 * _SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ArtifactRefused("tokenizer.json takes too long to load") from None
    if done.returncode == _DOES_NOT_FIT:
        raise ArtifactRefused("tokenizer.json makes tokens that the model cannot read")
    if done.returncode != 0:
        # What the process prints may quote the file.
        raise ArtifactRefused("tokenizer.json cannot be loaded")
