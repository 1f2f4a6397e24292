"""DeepSpeed engines: ZeRO-3 for a frozen large model, any ZeRO stage for the student."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import deepspeed
import torch
from torch import nn

Model = TypeVar("Model", bound=nn.Module)


def freeze_sharded(model: Model, settings: dict[str, Any]) -> Model:
    """A model that was made in ZeRO-3 shards, to be run and never trained.

    Call the module that is returned, not a DeepSpeed engine: then `loss.backward()` reaches tensors that went in, such as
    a soft prompt, and the caller reduces their gradients. Every rank must call it equally often.
    """
    engine, *_ = deepspeed.initialize(model=model.requires_grad_(False), config=settings)
    return engine.module


def train_sharded(model: nn.Module, optimizer: torch.optim.Optimizer, settings: dict[str, Any]) -> deepspeed.DeepSpeedEngine:
    """The engine that trains `model`; its frozen parameters take part in the forward alone."""
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    return engine


def gathered(module: nn.Module) -> AbstractContextManager[None]:
    """While entered, the module's parameters are whole on this rank, for reading. All ranks enter it."""
    context: AbstractContextManager[None] = deepspeed.zero.GatheredParameters(list(module.parameters()))
    return context


def gathered_from_main(weight: torch.Tensor) -> AbstractContextManager[None]:
    """While entered, a sharded weight is whole, and what rank 0 makes of it is what all ranks share out when it is left."""
    if not hasattr(weight, "ds_id"):
        return nullcontext()
    context: AbstractContextManager[None] = deepspeed.zero.GatheredParameters([weight], modifier_rank=0)
    return context


def full_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The whole state of a model on the CPU, gathered from its shards if it has any. All ranks call it."""
    with gathered(model):
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in model.state_dict().items()}


def shard_share(model: nn.Module) -> float:
    """The share of a model's parameters that this rank holds: 1 when it is not sharded."""
    held = whole = 0
    for parameter in model.parameters():
        whole += getattr(parameter, "ds_numel", parameter.numel())
        held += parameter.ds_tensor.numel() if hasattr(parameter, "ds_tensor") else parameter.numel()
    return held / whole
