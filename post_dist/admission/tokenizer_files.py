"""Rebuild a tokenizer's settings, and try the tokenizer in a process with limits.

A normalizer may multiply its input, and a vocabulary may be larger than the model's embeddings. So
the tokenizer first runs in a process of its own. Its time and memory are limited by the size of the
file, and it can open no file and no connection.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

from post_dist.artifacts.strict_json import read_object
from post_dist.errors import ArtifactRefused
from post_dist.models.load import PROBES

_MIB = 1 << 20
_LEAST_SECONDS = 3
_LEAST_MEMORY_BYTES = 320 * _MIB
_MEMORY_FACTOR = 64
"""Bytes of memory for each byte of a file. A vocabulary needs about 20."""
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
_MARKER = re.compile(r"<\S+>|\[\S+\]")
_CLASS = re.compile(r"[A-Za-z0-9]{1,64}")

_TRIAL = """
import json, resource, sys
from tokenizers import Tokenizer
with open(sys.argv[1], encoding="utf-8") as file:
    content = file.read()
texts, memory, seconds, vocabulary = json.loads(sys.argv[2])
resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
# Without a descriptor there is no file and no socket, for compiled code neither.
resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))
tokenizer = Tokenizer.from_str(content)
for text in texts:
    ids = tokenizer.encode(text).ids
    # A byte makes a few tokens at most.
    if len(ids) > 4 * len(text.encode()) + 8 or max(ids, default=0) >= vocabulary:
        sys.exit(9)
"""
_DOES_NOT_FIT = 9
# A pattern may need endless time for a repeated letter, and the first texts that this process
# itself encodes are the probes.
_TEXTS = ("", "L'été 1998", "  \n\t0@#", *PROBES, *(200 * letter for letter in "aAx0 .-_é"))
_ONE_THREAD = {"RAYON_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
"""Each thread would reserve memory, which counts against the limit."""


def rebuild_tokenizer_config(path: Path) -> None:
    """Check a tokenizer_config.json and replace it by one that holds the known fields alone.

    Raises:
        ArtifactRefused: a field has another type, or names no tokenizer that reads tokenizer.json.
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
        raise ArtifactRefused("tokenizer_config.json: tokenizer_class is not the name of a class")
    known = tokenizer_class_from_name(class_name)
    # The others have a vocabulary of their own, which nobody has tried.
    if known is None or not issubclass(known, PreTrainedTokenizerFast):
        raise ArtifactRefused("tokenizer_config.json: tokenizer_class is not a fast tokenizer")
    rebuilt["tokenizer_class"] = class_name
    path.write_text(json.dumps(rebuilt, indent=2) + "\n")


def _token(name: str, value: Any) -> str | dict[str, Any]:
    """Return a special token: its text, or its text with settings."""
    settings = value if isinstance(value, dict) else {"content": value}
    text = settings.get("content")
    if not isinstance(text, str) or len(text.encode()) > _TEXT_BYTES:
        raise ArtifactRefused(f"tokenizer_config.json: {name} is not a token")
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
    # Fixed limits would stop an honest tokenizer of 30 MB, or let a small one take the machine.
    size = path.stat().st_size
    memory = _LEAST_MEMORY_BYTES + _MEMORY_FACTOR * size
    seconds = _LEAST_SECONDS + size // _MIB
    settings = json.dumps([_TEXTS, memory, seconds, vocabulary])
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", _TRIAL, str(path), settings],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            # The processor may be shared with others.
            timeout=10 * seconds,
            env=os.environ | _ONE_THREAD,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ArtifactRefused("tokenizer.json takes too long to load") from None
    if done.returncode == _DOES_NOT_FIT:
        raise ArtifactRefused("tokenizer.json makes tokens that the model cannot read")
    if done.returncode != 0:
        # What the process prints may quote the file.
        raise ArtifactRefused("tokenizer.json cannot be loaded")


def check_tokens(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> None:
    """Check that a model has an embedding for each token that an example may hold.

    Some classes of tokenizers add a marker such as `<|endoftext|>` on their own.

    Raises:
        ArtifactRefused: a token has no embedding. An example with it would end a run.
    """
    # Examples are padded and closed with special tokens, so none of these may lack an embedding.
    unread = {token for token, number in tokenizer.get_vocab().items() if number >= vocabulary}
    added = {getattr(tokenizer, name) for name in _TOKENS - {"unk_token"}}
    if unread & added or not all(map(_MARKER.fullmatch, unread)):
        raise ArtifactRefused("the tokenizer has tokens that the model has no embeddings for")
