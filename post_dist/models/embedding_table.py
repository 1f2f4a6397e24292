"""Read the input embeddings of a model from its files, without loading the model.

Shapes: V vocabulary, d width.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from post_dist.errors import InputError
from post_dist.models.facts import meta_model
from post_dist.models.weight_files import weight_files

_ROWS_AT_ONCE = 8192


def largest_embedding_norm(folder: Path) -> float:
    """Return the largest Euclidean norm of an input embedding.

    Args:
        folder: folder of the model in Hugging Face format.

    Returns:
        The norm; infinite if no file holds the embeddings under a name that the model knows.
    """
    model = meta_model(folder).model
    # Gemma's embeddings are larger than its table.
    scale: Any = getattr(model.get_input_embeddings(), "scalar_embed_scale", 1.0)
    with _stored_table(folder, model) as table_Vd:
        return math.inf if table_Vd is None else scale * _largest_norm(table_Vd)


def read_embedding_table(folder: Path) -> torch.Tensor:
    """Read what a model puts in the place of each token, [V, d], in the precision of its file.

    Args:
        folder: folder of the model in Hugging Face format.

    Raises:
        InputError: no file holds the embeddings, or the family computes more than a look-up.
    """
    model = meta_model(folder).model
    module = model.get_input_embeddings()
    # Gemma multiplies the embeddings of tokens, but not given ones.
    scale = getattr(module, "scalar_embed_scale", None)
    if type(module) is not nn.Embedding and scale is None:
        raise InputError(f"{folder}: a {type(module).__name__} is more than a table of embeddings")
    with _stored_table(folder, model) as stored_Vd:
        if stored_Vd is None:
            raise InputError(f"{folder} has no embeddings under a name that its family knows")
        table_Vd: torch.Tensor = stored_Vd[:]
    return table_Vd if scale is None else table_Vd * torch.tensor(scale, dtype=table_Vd.dtype)


@contextmanager
def _stored_table(folder: Path, model: Any) -> Iterator[Any | None]:
    """Open the file with the embeddings of a model that is on the meta device.

    Yields:
        A slice of safetensors, or None if no file holds them under a name that the model knows.
    """
    # Loading a large LLM for one tensor would take minutes, and memory for all of it.
    table = model.get_input_embeddings().get_parameter("weight")
    # A tied table may be stored under the name of the head. Some files omit the trunk's prefix.
    own = {name for name, tensor in model.state_dict(keep_vars=True).items() if tensor is table}
    prefix = f"{model.base_model_prefix}."
    known = own | {name.removeprefix(prefix) for name in own}
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as weights:
            for name in known & set(weights.keys()):
                yield weights.get_slice(name)
                return
    yield None


def _largest_norm(table_Vd: Any) -> float:
    largest = 0.0
    for start in range(0, table_Vd.get_shape()[0], _ROWS_AT_ONCE):
        # A table of 256,000 rows of width 8,192 takes 8 GB in fp32.
        rows = table_Vd[start : start + _ROWS_AT_ONCE]
        largest = max(largest, float(rows.float().norm(dim=1).max()))
    return largest
