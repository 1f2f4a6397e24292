"""Let torch compile the layers of a model, which fuses their small operations."""

import os
import stat
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import Cache

from post_dist.errors import EnvironmentFault, first_line
from post_dist.models.language_model import LanguageModel
from post_dist.models.lower_block import SkippedLayer

_MOST_VERSIONS = 64
"""Versions of the code of a layer: with and without gradients, hooks, a mask, a window. Torch runs
a layer uncompiled beyond this number, which is 8 otherwise."""


def compile_layers(model: LanguageModel) -> None:
    """Compile the layers of a whole model, each by itself, at their first forward pass.

    Layers of one class share their code, so a model takes as long to compile as one layer. One code
    serves all shapes. A pass that reads or fills a cache of keys and values runs as before: it has
    the number of its layer, so each layer would have code of its own.

    Raises:
        EnvironmentFault: torch cannot compile on this machine, or others may write where it keeps
            compiled code.
    """
    _set_compiler()
    _check_cache()
    _check_compiler(model.model.device.type)
    for layer in model.layers:
        if not isinstance(layer, SkippedLayer):
            layer.forward = _compiled(layer.forward)
    model.is_compiled = True


def _compiled(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return the forward pass of a layer, which is compiled where no cache is given."""
    fused = torch.compile(forward, dynamic=True)

    def run(*states: Any, **options: Any) -> Any:
        has_cache = any(isinstance(given, Cache) for given in (*states, *options.values()))
        return forward(*states, **options) if has_cache else fused(*states, **options)

    return run


def compile_again(model: LanguageModel) -> None:
    """Compile the layers of a copy of a compiled model, if it is one.

    The copied layers still have the compiled code of the original ones, which uses their weights.
    """
    if model.is_compiled:
        for layer in model.layers:
            vars(layer).pop("forward", None)
        compile_layers(model)


def _set_compiler() -> None:
    """Set what torch's compiler assumes of a model, for the whole process."""
    # Otherwise the number of a layer is a constant of its code, and each layer has code of its own.
    torch._dynamo.config.allow_unspec_int_on_nn_module = True
    # Otherwise compiled code does not see the hooks of a LoRA, or of the last layer's MLP.
    torch._dynamo.config.skip_nnmodule_hook_guards = False
    torch._dynamo.config.recompile_limit = _MOST_VERSIONS
    # Otherwise a kernel is chosen by its speed, and the next start may round otherwise.
    torch._inductor.config.deterministic = True
    # The masks of packed sequences are cached. Compiled code makes its own, which are equal.
    warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`")


def _check_cache() -> None:
    """Refuse a folder of compiled code that others may write to, because torch runs what is there.

    By default it has a name in the folder of temporary files that anybody could take first.
    """
    from torch._inductor.runtime.cache_dir_utils import cache_dir  # loads the compiler

    folder = Path(cache_dir())
    status = folder.stat()
    owners = {folder.lstat().st_uid, status.st_uid}
    if owners == {os.geteuid()} and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return
    raise EnvironmentFault(
        f"engine.compile: others may write to {folder}, from which torch runs compiled code",
        "set TORCHINDUCTOR_CACHE_DIR to a folder that only this account may write to",
    )


@cache
def _check_compiler(device_type: str) -> None:
    """Compile one operation, because a missing compiler would be found only in the first step."""
    try:
        torch.compile(torch.neg)(torch.zeros(1, device=device_type))
    except Exception as error:
        # The backends raise errors of many classes.
        raise EnvironmentFault(
            f"engine.compile: torch cannot compile for this {device_type}: {first_line(error)}",
            "install a C++ compiler, and Triton for a GPU, or leave engine.compile out",
        ) from error
