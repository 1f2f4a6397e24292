"""Gather sharded parameters for a while. Whatever is not sharded stays as it is."""

from contextlib import AbstractContextManager, nullcontext

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


def gathered_from_reader(weights: list[nn.Parameter]) -> AbstractContextManager[None]:
    """Gather sharded weights, and give all ranks the values of the first rank afterwards.

    The body may change the weights on the group's first rank. Weights that are not sharded are left
    unchanged.
    """
    if not any(hasattr(weight, "ds_id") for weight in weights):
        return nullcontext()
    import deepspeed

    context: AbstractContextManager[None] = deepspeed.zero.GatheredParameters(
        weights, modifier_rank=0
    )
    return context
