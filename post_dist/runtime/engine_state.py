"""What a training engine would lose in a crash, as plain tensors that any number of ranks can take up again.

DeepSpeed keeps the fp32 weights and Adam's moments in flat tensors that are cut differently for each ZeRO stage and number of ranks.
Here each rank names the pieces of parameters that lie in its own flat tensors; a piece is a stretch of a flattened parameter.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from safetensors import safe_open

_MOMENTS = ("exp_avg", "exp_avg_sq")
_ADAM_STEP = "adam_step"


@dataclass(frozen=True)
class _Piece:
    """A stretch of a parameter on this rank: elements `start` on of the parameter, `offset` on of a flat fp32 tensor."""

    name: str
    start: int
    flat: torch.Tensor
    offset: int
    length: int

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The stretch in the flat tensor or in one of its moments; writing to it writes there."""
        return tensor.view(-1).narrow(0, self.offset, self.length)


def engine_state(engine: deepspeed.DeepSpeedEngine) -> dict[str, torch.Tensor]:
    """This rank's pieces of the trained weights and moments, fp32, on the CPU; whole parameters from rank 0 alone at ZeRO-0."""
    pieces, optimizer = _pieces(engine), _inner(engine)
    tensors = {}
    for piece in pieces:
        state = optimizer.state.get(piece.flat, {})
        for kind, tensor in {
            "weight": piece.flat,
            **{kind: state[kind] for kind in _MOMENTS if kind in state},
        }.items():
            tensors[f"{piece.name}/{kind}/{piece.start}"] = piece.of(tensor.detach()).to(
                "cpu", copy=True
            )
        if "step" in state:
            tensors[_ADAM_STEP] = torch.as_tensor(state["step"]).cpu()
    return tensors if engine.zero_optimization_stage() or dist.get_rank() == 0 else {}


@torch.no_grad()
def restore_engine(engine: deepspeed.DeepSpeedEngine, files: Sequence[Path]) -> None:
    """Put an engine to what `engine_state` gave of all ranks of an earlier run, whatever its stage and number of ranks."""
    pieces, optimizer = _pieces(engine), _inner(engine)
    with ExitStack() as stack:
        saved = _Saved([stack.enter_context(safe_open(file, framework="pt")) for file in files])
        if saved.adam_step is not None:
            for piece in pieces:
                optimizer.state[piece.flat] |= {"step": saved.adam_step.clone()}
                for kind in _MOMENTS:
                    optimizer.state[piece.flat].setdefault(kind, torch.zeros_like(piece.flat))
        for piece in pieces:
            for kind in ("weight", *_MOMENTS[: len(_MOMENTS) * (saved.adam_step is not None)]):
                place = piece.of(
                    piece.flat.data if kind == "weight" else optimizer.state[piece.flat][kind]
                )
                for first, values in saved.stretch(piece.name, kind, piece.start, piece.length):
                    place[first : first + len(values)] = values.to(place.device)
    _to_working_precision(engine)


class _Saved:
    """The pieces in the files of a checkpoint."""

    def __init__(self, handles: Sequence[Any]) -> None:
        self._pieces: dict[tuple[str, str], list[tuple[int, Any]]] = {}
        self.adam_step: torch.Tensor | None = None
        for handle in handles:
            for key in handle.keys():
                if key == _ADAM_STEP:
                    self.adam_step = handle.get_tensor(key)
                    continue
                name, kind, start = key.rsplit("/", 2)
                self._pieces.setdefault((name, kind), []).append(
                    (int(start), handle.get_slice(key))
                )

    def stretch(
        self, name: str, kind: str, start: int, length: int
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """What there is of elements `start` to `start + length` of a parameter: each with its place in the stretch."""
        for saved_start, values in self._pieces[name, kind]:
            first, last = (
                max(start, saved_start),
                min(start + length, saved_start + values.get_shape()[0]),
            )
            if first < last:
                yield first - start, values[first - saved_start : last - saved_start]


def _inner(engine: deepspeed.DeepSpeedEngine) -> torch.optim.Optimizer:
    """The torch optimizer inside of DeepSpeed's."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def _pieces(engine: deepspeed.DeepSpeedEngine) -> list[_Piece]:
    """Which stretches of the trained parameters this rank steps."""
    optimizer = engine.optimizer
    trained = [
        (name, parameter)
        for name, parameter in engine.module.named_parameters()
        if parameter.requires_grad
    ]
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        return [
            piece
            for name, parameter in trained
            for piece in _stage_3_pieces(optimizer, name, parameter)
        ]
    if isinstance(optimizer, DeepSpeedZeroOptimizer):
        return [
            piece
            for name, parameter in trained
            for piece in _stage_1_and_2_pieces(optimizer, name, parameter)
        ]
    masters = {parameter: parameter for _, parameter in trained}
    if isinstance(optimizer, FP16_UnfusedOptimizer):
        groups = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
        masters = {
            low: high for lows, highs in groups for low, high in zip(lows, highs, strict=True)
        }
    return [
        _Piece(name, 0, masters[parameter], 0, parameter.numel()) for name, parameter in trained
    ]


def _stage_3_pieces(optimizer: Any, name: str, parameter: Any) -> list[_Piece]:
    group, offset, held = optimizer.grad_position[optimizer.get_param_id(parameter)]
    start = held * dist.get_rank(parameter.ds_process_group)
    length = min(held, parameter.ds_numel - start)  # the last rank's share is filled up
    return (
        [_Piece(name, start, optimizer.fp32_partitioned_groups_flat[group], offset, length)]
        if length > 0
        else []
    )


def _stage_1_and_2_pieces(optimizer: Any, name: str, parameter: Any) -> list[_Piece]:
    mapping = parameter._hp_mapping
    if mapping is None:  # it lies on other ranks
        return []
    flat = optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
    place = mapping.hp_fragment_address
    return [_Piece(name, mapping.lp_fragment_address.start, flat, place.start, place.numel)]


def _to_working_precision(engine: deepspeed.DeepSpeedEngine) -> None:
    """Make the weights that the model computes with from the fp32 ones."""
    optimizer = engine.optimizer
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].partition(optimizer.persistent_parameters)
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
    elif isinstance(optimizer, DeepSpeedZeroOptimizer):
        optimizer.update_lp_params()
    elif isinstance(optimizer, FP16_UnfusedOptimizer):
        for lows, highs in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            for low, high in zip(lows, highs, strict=True):
                low.data.copy_(high.data)
