"""Find the files of a model's weights, as transformers chooses them, and compare tied weights.

A folder may hold other weights too, such as those of an earlier version or of another format.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open

from post_dist.errors import InputError

INDEX = "model.safetensors.index.json"
ONE_FILE = "model.safetensors"
_ADAPTER = "adapter_config.json"
_ROWS_AT_ONCE = 1 << 14


def weight_files(folder: Path) -> list[Path]:
    """Return the files that hold the weights of the model in a folder, sorted by name.

    Raises:
        InputError: the folder has no weights in safetensors, its index is damaged, or an adapter
            stands beside them, which transformers would add to them.
    """
    if (folder / _ADAPTER).exists():
        raise InputError(
            f"{folder} has an adapter ({_ADAPTER}) beside the model's weights",
            "merge the adapter into the model, or move its files away",
        )
    if (folder / ONE_FILE).is_file():
        return [folder / ONE_FILE]
    if (folder / INDEX).is_file():
        return _files_of_index(folder)
    raise InputError(
        f"{folder} has no safetensors weights: neither {ONE_FILE} nor {INDEX}",
        "convert the model with save_pretrained; pickles are not loaded",
    )


def _files_of_index(folder: Path) -> list[Path]:
    """Return the files that an index names."""
    try:
        names = set(json.loads((folder / INDEX).read_text())["weight_map"].values())
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        names = set()
    # An index may name files outside the folder, which a library would open.
    files = [folder / str(name) for name in sorted(names, key=str)]
    damaged = [file.name for file in files if file.parent != folder or not file.is_file()]
    if not files or damaged:
        what = f"names {damaged[0]}, which is not a file beside it" if damaged else "names no files"
        raise InputError(f"{folder / INDEX} {what}", "get the whole model again")
    return files


def check_tied(folder: Path, tied: Mapping[str, str]) -> None:
    """Check that tied weights that the files hold under two names are the same under both.

    Otherwise transformers does not tie them, whatever config.json says, and other loaders do.

    Args:
        folder: folder of the model.
        tied: the name of a weight by that of another one to which config.json ties it.

    Raises:
        InputError: their values differ.
    """
    if not tied:
        return
    file_of = {}
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as weights:
            file_of.update(dict.fromkeys(weights.keys(), file))
    for one, other in tied.items():
        if one in file_of and other in file_of and not _equal(one, other, file_of):
            raise InputError(
                f"{folder}: config.json ties {one} to {other}, and their stored values differ",
                "set tie_word_embeddings: false in config.json, or get the model again",
            )


def _equal(one: str, other: str, file_of: dict[str, Path]) -> bool:
    """Return whether two stored tensors are equal. A few rows are in memory at a time."""
    with (
        safe_open(file_of[one], framework="pt") as of_one,
        safe_open(file_of[other], framework="pt") as of_other,
    ):
        first, second = of_one.get_slice(one), of_other.get_slice(other)
        if first.get_shape() != second.get_shape():
            return False
        for start in range(0, first.get_shape()[0], _ROWS_AT_ONCE):
            rows = slice(start, start + _ROWS_AT_ONCE)
            if not torch.equal(first[rows], second[rows]):
                return False
    return True
