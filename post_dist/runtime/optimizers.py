"""The optimizers that a run file can name. To add one, add a line here and its name to `OptimizerName`."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import Optimizer

from post_dist.config.schema import OptimizerName

_DISTILLATION_ADAMW: dict[str, Any] = {"betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.0}
"""Settings of POST's distill/train.py."""

_FACTORIES: dict[OptimizerName, Callable[[Iterable[Any]], Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": lambda groups: torch.optim.AdamW(groups, **_DISTILLATION_ADAMW),
    "sgd": torch.optim.SGD,
}


def make_optimizer(name: OptimizerName, groups: Iterable[dict[str, Any]]) -> Optimizer:
    """Make an optimizer by the name that a run file gives it.

    Args:
        name: a key of the table above.
        groups: parameter groups as torch takes them, each with `params` and `lr`.

    Returns:
        The optimizer, without any state yet.
    """
    return _FACTORIES[name](list(groups))
