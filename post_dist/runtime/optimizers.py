"""The optimizers that a run file can name.

To add an optimizer, add it to `_FACTORIES` here and to `OptimizerName` in the schema.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import Optimizer

from post_dist.config.schema import OptimizerName

Groups = Iterable[dict[str, Any]]
"""Parameter groups as torch takes them, each with `params` and `lr`."""


def _distillation_adamw(groups: Groups) -> Optimizer:
    """Make AdamW with the settings of distill/train.py in POST's code."""
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.0)


_FACTORIES: dict[OptimizerName, Callable[[Groups], Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": _distillation_adamw,
    "sgd": torch.optim.SGD,
}


def make_optimizer(name: OptimizerName, groups: Groups) -> Optimizer:
    """Make an optimizer by its name in the run file.

    Args:
        name: name of the optimizer.
        groups: parameter groups as torch takes them, each with `params` and `lr`.

    Returns:
        The optimizer, without any state yet.
    """
    return _FACTORIES[name](list(groups))
