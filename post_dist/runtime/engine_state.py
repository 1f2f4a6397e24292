"""The state of a training engine as plain tensors that any number of ranks can restore.

DeepSpeed keeps fp32 weights and Adam's moments in flat tensors. Their layout depends on the ZeRO
stage and the number of ranks. Here each rank saves the pieces of parameters that its own flat
tensors hold. A piece is a range of a flattened parameter.
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
"""torch's names for the first and second moment of Adam."""
_ADAM_STEP = "adam_step"


@dataclass(frozen=True)
class _Piece:
    """A range of a parameter that this rank holds.

    Attributes:
        name: name of the parameter.
        start: first element of the range in the flattened parameter.
        flat: DeepSpeed's flat fp32 tensor.
        offset: first element of the range in the flat tensor.
        length: number of elements.
    """

    name: str
    start: int
    flat: torch.Tensor
    offset: int
    length: int

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a view of the range in the flat tensor, or in a moment of the same layout."""
        return tensor.view(-1).narrow(0, self.offset, self.length)


def engine_state(engine: deepspeed.DeepSpeedEngine) -> dict[str, torch.Tensor]:
    """Return this rank's pieces of the trained weights and moments, in fp32 on the CPU.

    At ZeRO-0 every rank holds whole parameters, so rank 0 alone returns them.
    """
    if not engine.zero_optimization_stage() and dist.get_rank() != 0:
        return {}
    optimizer = _torch_optimizer(engine)
    # Adam keeps its moments in tensors of the same layout as the flat weights.
    tensors = {}
    for piece in _pieces(engine):
        state = optimizer.state.get(piece.flat, {})
        flat_tensors = {"weight": piece.flat}
        for kind in _MOMENTS:
            if kind in state:
                flat_tensors[kind] = state[kind]
        for kind, flat in flat_tensors.items():
            key = f"{piece.name}/{kind}/{piece.start}"
            tensors[key] = piece.of(flat.detach()).to("cpu", copy=True)
        if "step" in state:
            tensors[_ADAM_STEP] = torch.as_tensor(state["step"]).to("cpu", copy=True)
    return tensors


def holds_state(file: Path, engine: deepspeed.DeepSpeedEngine) -> bool:
    """Return whether a file has all pieces that this rank holds, and so no other file is needed.

    Args:
        file: the safetensors file of a rank of an earlier run.
        engine: the engine.
    """
    with safe_open(file, framework="pt") as handle:
        saved = {key: handle.get_slice(key).get_shape() for key in handle.keys()}
    pieces = _pieces(engine)
    # A rank without pieces would not learn which step Adam is at.
    return bool(pieces) and all(
        saved.get(f"{piece.name}/weight/{piece.start}") == [piece.length] for piece in pieces
    )


@torch.no_grad()
def restore_engine(engine: deepspeed.DeepSpeedEngine, files: Sequence[Path]) -> None:
    """Set an engine to the state that `engine_state` returned on the ranks of an earlier run.

    Args:
        engine: the engine. ZeRO stage and number of ranks may differ from the earlier run.
        files: the safetensors files of the earlier run's ranks.
    """
    pieces = _pieces(engine)
    optimizer = _torch_optimizer(engine)
    with ExitStack() as stack:
        handles = [stack.enter_context(safe_open(file, framework="pt")) for file in files]
        saved = _SavedPieces(handles)

        # A state from before the first step has no moments.
        kinds: tuple[str, ...] = ("weight",)
        if saved.adam_step is not None:
            kinds += _MOMENTS
            _make_moments(pieces, optimizer, saved.adam_step)

        # With another number of ranks, several saved pieces may overlap one piece of this rank.
        for piece in pieces:
            for kind in kinds:
                is_weight = kind == "weight"
                flat = piece.flat.data if is_weight else optimizer.state[piece.flat][kind]
                place = piece.of(flat)
                for first, values in saved.overlaps(piece, kind):
                    place[first : first + len(values)] = values.to(place.device)
    _update_working_weights(engine)


def _make_moments(
    pieces: Sequence[_Piece], optimizer: torch.optim.Optimizer, step: torch.Tensor
) -> None:
    """Create zero moments and the saved step count in the optimizer, for each flat tensor."""
    for piece in pieces:
        state = optimizer.state[piece.flat]
        state["step"] = step.clone()
        for kind in _MOMENTS:
            state.setdefault(kind, torch.zeros_like(piece.flat))


class _SavedPieces:
    """The pieces in the files of a checkpoint."""

    def __init__(self, handles: Sequence[Any]) -> None:
        self._pieces: dict[tuple[str, str], list[tuple[int, Any]]] = {}
        self.adam_step: torch.Tensor | None = None
        for handle in handles:
            for key in handle.keys():
                if key == _ADAM_STEP:
                    self.adam_step = handle.get_tensor(key)
                    continue
                # The name of a parameter contains dots, but no slash.
                name, kind, start = key.rsplit("/", 2)
                saved = (int(start), handle.get_slice(key))
                self._pieces.setdefault((name, kind), []).append(saved)

    def overlaps(self, piece: _Piece, kind: str) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield the saved values that belong to a piece, with the index of their first element."""
        piece_end = piece.start + piece.length
        for saved_start, values in self._pieces[piece.name, kind]:
            saved_end = saved_start + values.get_shape()[0]
            first = max(piece.start, saved_start)
            end = min(piece_end, saved_end)
            if first < end:
                yield first - piece.start, values[first - saved_start : end - saved_start]


def _torch_optimizer(engine: deepspeed.DeepSpeedEngine) -> torch.optim.Optimizer:
    """Return the torch optimizer inside DeepSpeed's; ZeRO-0 in fp32 has no wrapper."""
    # pyrefly: ignore[bad-return]
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def _pieces(engine: deepspeed.DeepSpeedEngine) -> list[_Piece]:
    """List the ranges of the trained parameters that this rank's optimizer steps."""
    optimizer = engine.optimizer
    trained = {}
    # pyrefly: ignore[missing-attribute]
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            trained[name] = parameter

    pieces = []
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        for name, parameter in trained.items():
            pieces += _stage_3_pieces(optimizer, name, parameter)
        return pieces
    if isinstance(optimizer, DeepSpeedZeroOptimizer):
        for name, parameter in trained.items():
            pieces += _stage_1_and_2_pieces(optimizer, name, parameter)
        return pieces

    # ZeRO-0: every rank steps every parameter, or in half precision its fp32 copy.
    fp32_copies = dict(_fp32_copies(optimizer))
    for name, parameter in trained.items():
        flat = fp32_copies.get(parameter, parameter)
        pieces.append(_Piece(name, 0, flat, 0, parameter.numel()))
    return pieces


def _fp32_copies(optimizer: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield each half-precision parameter of a ZeRO-0 optimizer with its fp32 copy."""
    if not isinstance(optimizer, FP16_UnfusedOptimizer):
        return
    for low_group, high_group in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
        yield from zip(low_group, high_group, strict=True)


def _stage_3_pieces(optimizer: Any, name: str, parameter: Any) -> list[_Piece]:
    group, offset, shard_length = optimizer.grad_position[optimizer.get_param_id(parameter)]
    start = shard_length * dist.get_rank(parameter.ds_process_group)
    # All shards have the same length, so those of the last ranks may end with padding or be all
    # padding.
    length = min(shard_length, parameter.ds_numel - start)
    if length <= 0:
        return []
    return [_Piece(name, start, optimizer.fp32_partitioned_groups_flat[group], offset, length)]


def _stage_1_and_2_pieces(optimizer: Any, name: str, parameter: Any) -> list[_Piece]:
    # DeepSpeed maps each parameter to its range in this rank's fp32 weights. The mapping is None if
    # other ranks hold the whole parameter.
    mapping = parameter._hp_mapping
    if mapping is None:
        return []
    flat = optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
    place = mapping.hp_fragment_address
    return [_Piece(name, mapping.lp_fragment_address.start, flat, place.start, place.numel)]


def _update_working_weights(engine: deepspeed.DeepSpeedEngine) -> None:
    """Copy the fp32 weights into those that the model computes with."""
    optimizer = engine.optimizer
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        # Small parameters stay gathered between steps, so shard them, update them and gather again.
        persistent = optimizer.persistent_parameters
        if persistent:
            persistent[0].partition(persistent)
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if persistent:
            persistent[0].all_gather(persistent)
    elif isinstance(optimizer, DeepSpeedZeroOptimizer):
        optimizer.update_lp_params()
    else:
        for low, high in _fp32_copies(optimizer):
            low.data.copy_(high.data)
