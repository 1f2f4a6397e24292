"""Gather sharded parameters for a while. Whatever is not sharded stays as it is."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn


def gathered(module: nn.Module) -> AbstractContextManager[None]:
    """Gather the parameters of a module on every rank while the body reads them.

    All ranks enter it together. A module that is not sharded is left as it is.
    """
    if not any(hasattr(parameter, "ds_id") for parameter in module.parameters()):
        return nullcontext()
    # A module in shards has loaded DeepSpeed. The private stages have none and do without it.
    import deepspeed

    context: AbstractContextManager[None] = deepspeed.zero.GatheredParameters(
        list(module.parameters())
    )
    return context


def gathered_from_reader(weight: torch.Tensor) -> AbstractContextManager[None]:
    """Gather a sharded weight, and give all ranks the value of the first rank afterwards.

    The body may change the weight on the group's first rank. A weight that is not sharded is left
    unchanged.
    """
    if not hasattr(weight, "ds_id"):
        return nullcontext()
    import deepspeed

    context: AbstractContextManager[None] = deepspeed.zero.GatheredParameters(
        [weight], modifier_rank=0
    )
    return context
