"""Read the input embeddings of a model from its files, without loading the model."""

import math
from pathlib import Path
from typing import Any

from safetensors import safe_open

from post_dist.models.facts import meta_model

_ROWS_AT_ONCE = 8192


def largest_embedding_norm(folder: Path) -> float:
    """Return the largest Euclidean norm of an input embedding.

    Args:
        folder: folder of the model in Hugging Face format.

    Returns:
        The norm; infinite if no file holds the embeddings under a name that the model knows.
    """
    # Loading a large LLM for one tensor would take minutes, and memory for all of it.
    model = meta_model(folder).model
    table = model.get_input_embeddings().get_parameter("weight")
    # A tied table may be stored under the name of the head. Some files omit the trunk's prefix.
    own = {name for name, tensor in model.state_dict(keep_vars=True).items() if tensor is table}
    prefix = f"{model.base_model_prefix}."
    known = own | {name.removeprefix(prefix) for name in own}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            for name in known & set(weights.keys()):
                return _largest_norm(weights.get_slice(name))
    return math.inf


def _largest_norm(table_Vd: Any) -> float:
    largest = 0.0
    for start in range(0, table_Vd.get_shape()[0], _ROWS_AT_ONCE):
        # A table of 256,000 rows of width 8,192 takes 8 GB in fp32.
        rows = table_Vd[start : start + _ROWS_AT_ONCE]
        largest = max(largest, float(rows.float().norm(dim=1).max()))
    return largest
