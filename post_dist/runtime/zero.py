"""DeepSpeed engines: ZeRO-3 for a frozen large model, any ZeRO stage for the student."""

from typing import Any, TypeVar

import deepspeed
import torch
from torch import nn

from post_dist.runtime.distributed import World, prepare_deepspeed
from post_dist.runtime.gathering import gathered

Model = TypeVar("Model", bound=nn.Module)


def freeze_sharded(model: Model, settings: dict[str, Any]) -> Model:
    """Freeze a model that was created in ZeRO-3 shards, and return it ready to run.

    The result is the module itself instead of a DeepSpeed engine. `loss.backward()` then reaches
    its input tensors, such as a soft prompt. The caller averages their gradients over ranks. Every
    rank must call the module equally often.

    Args:
        model: a model that was created under `deepspeed.zero.Init`.
        settings: the DeepSpeed settings of a frozen model.
    """
    # The hooks on the module keep the engine alive.
    engine, *_ = deepspeed.initialize(model=model.requires_grad_(False), config=settings)
    # pyrefly: ignore[bad-return]
    return engine.module


def train_sharded(
    model: nn.Module, optimizer: torch.optim.Optimizer, settings: dict[str, Any], world: World
) -> deepspeed.DeepSpeedEngine:
    """Return the engine that trains a model. Frozen parameters of the model are not updated.

    Args:
        model: a whole model.
        optimizer: an optimizer over the model's trained parameters.
        settings: the DeepSpeed settings for training.
        world: the ranks, which all call this function.
    """
    prepare_deepspeed(world)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    return engine


def full_weights(model: nn.Module, world: World) -> dict[str, torch.Tensor]:
    """Return the whole state of a model on rank 0, in host memory.

    A sharded model is gathered. All ranks call it together, and the other ranks get an empty
    dictionary.
    """
    weights: dict[str, torch.Tensor] = {}
    with gathered(model):
        if world.is_main:
            # A copy, because the gathered weights are freed when this context ends.
            for name, tensor in model.state_dict().items():
                weights[name] = tensor.detach().to("cpu", copy=True)
    return weights


def shard_share(model: nn.Module) -> float:
    """Return the fraction of a model's parameters that this rank holds; 1 without sharding."""
    held = 0
    for parameter in model.parameters():
        # A sharded parameter is empty itself. DeepSpeed stores its shard as an attribute.
        held += getattr(parameter, "ds_tensor", parameter).numel()
    return held / number_of_parameters(model)


def number_of_parameters(model: nn.Module) -> int:
    """Return the number of parameters of a whole model, which may be sharded."""
    count = 0
    for parameter in model.parameters():
        # DeepSpeed stores the size of a sharded parameter as an attribute.
        count += getattr(parameter, "ds_numel", parameter.numel())
    return count
