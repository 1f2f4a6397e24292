"""The optimizers that a run file can name.

To add an optimizer, add it to `_FACTORIES` here and to `OptimizerName` in the schema.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from post_dist.config.schema import OptimizerName

Groups = Iterable[dict[str, Any]]
"""Parameter groups as torch takes them, each with `params` and `lr`."""


def _distillation_adamw(groups: Groups) -> Optimizer:
    """Make AdamW with the settings of distill/train.py in POST's code."""
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.0)


def _averaged_sgd(groups: Groups) -> Optimizer:
    """Make SGD that also keeps the mean of its values, from step `t0` of each group on."""
    # With lambd and alpha of zero, the steps are those of SGD.
    return torch.optim.ASGD(groups, lambd=0.0, alpha=0.0)


_FACTORIES: dict[OptimizerName, Callable[[Groups], Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": _distillation_adamw,
    "sgd": torch.optim.SGD,
    "averaged_sgd": _averaged_sgd,
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


def averaging_from(steps: int) -> dict[str, float]:
    """Return the option of a parameter group that averages the second half of the steps."""
    # torch begins the mean at the second step behind `t0`.
    return {"t0": steps / 2 - 1}


def result_of(parameters: Sequence[torch.Tensor], optimizer: Optimizer) -> list[torch.Tensor]:
    """Return the values that a training ends with: their means, or those of the last step."""
    results = []
    for parameter in parameters:
        results.append(optimizer.state[parameter].get("ax", parameter).detach())
    return results
