"""Where an unfinished stage goes on: the prompt's state, or the student's in one file a rank.

Every checkpoint is written beside its place with the sha256 of each of its files, flushed, and renamed. The newest one whose
files are all as they were written counts, and the two newest are kept.
"""

import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

import deepspeed
import torch
from safetensors.torch import load_file, save_file

from post_dist.files import file_digests, put_in_place, write_folder, writing
from post_dist.runtime.distributed import World
from post_dist.runtime.engine_state import engine_state, restore_engine
from post_dist.runtime.watchdog import phase

log = logging.getLogger(__name__)

_KEEP = 2
_TENSORS = "state.safetensors"
_SEAL = "checkpoint.json"


def newest_step(folder: Path) -> int:
    """The step of the newest checkpoint that is as it was written, 0 when there is none; a damaged one is named and passed over."""
    for path in sorted(folder.glob("step-*"), key=_step_of, reverse=True):
        if _is_whole(path):
            return _step_of(path)
        log.warning("%s is damaged: going back to the checkpoint before it", path)
        shutil.rmtree(path)
    return 0


def save_tensors(folder: Path, step: int, tensors: dict[str, torch.Tensor]) -> None:
    """Keep a few small tensors, such as a prompt and its optimizer's moments."""

    def fill(partial: Path) -> None:
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            partial / _TENSORS,
        )
        _seal(partial)

    write_folder(folder / f"step-{step}", fill)
    _drop_old(folder)


def load_tensors(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """The tensors of the checkpoint at `step`."""
    return load_file(folder / f"step-{step}" / _TENSORS)


def optimizer_state(
    parameters: Sequence[torch.Tensor], optimizer: torch.optim.Optimizer
) -> dict[str, torch.Tensor]:
    """The values of a few parameters and what the optimizer keeps for them."""
    state = {}
    for index, parameter in enumerate(parameters):
        state[f"{index}"] = parameter
        state |= {
            f"{index}.{name}": value
            for name, value in optimizer.state[parameter].items()
            if value is not None
        }
    return state


def restore_optimizer(
    parameters: Sequence[torch.Tensor],
    optimizer: torch.optim.Optimizer,
    saved: dict[str, torch.Tensor],
) -> None:
    """Put parameters and optimizer back to what `optimizer_state` gave."""
    for index, parameter in enumerate(parameters):
        with torch.no_grad():
            parameter.copy_(saved[f"{index}"])
        moments = {
            name.partition(".")[2]: value
            for name, value in saved.items()
            if name.startswith(f"{index}.")
        }
        optimizer.state[parameter] = {
            name: value if name == "step" else value.to(parameter)
            for name, value in moments.items()
        }


def take_up(
    parameters: Sequence[torch.Tensor],
    optimizer: torch.optim.Optimizer,
    folder: Path,
    resume: str,
    world: World,
) -> int:
    """Put parameters and optimizer to where an earlier run left them, if one did; the step to go on from."""
    step = start_step(folder, resume, world)
    if step:
        restore_optimizer(parameters, optimizer, load_tensors(folder, step))
    return step


def save_engine(folder: Path, step: int, engine: deepspeed.DeepSpeedEngine, world: World) -> None:
    """Keep an engine's trained weights and optimizer; all ranks call it.

    Raises:
        EnvironmentFault: a rank cannot write; the checkpoints before are as they were.
    """
    place, partial = folder / f"step-{step}", folder / f".step-{step}.partial"
    phase(f"writing the checkpoint of step {step}")

    def make_room() -> None:
        with writing(place):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)

    def write() -> None:
        tensors = engine_state(engine)
        if tensors:
            with writing(place):
                save_file(tensors, partial / f"rank{world.rank}.safetensors")

    def finish() -> None:
        with writing(place):
            _seal(partial)
            put_in_place(partial, place)
        _drop_old(folder)

    try:
        world.on_main(make_room)
        world.together(write)
        world.on_main(finish)
    finally:
        if world.is_main:
            shutil.rmtree(partial, ignore_errors=True)


def load_engine(folder: Path, step: int, engine: deepspeed.DeepSpeedEngine) -> None:
    """Put an engine back to the checkpoint at `step`; all ranks call it, and they may be more or fewer than those that saved it."""
    restore_engine(engine, sorted((folder / f"step-{step}").glob("*.safetensors")))


def start_step(folder: Path, resume: str, world: World) -> int:
    """The step to start from; `resume` of `never` throws earlier checkpoints away."""
    if world.is_main and resume == "never":
        shutil.rmtree(folder, ignore_errors=True)
    step = world.from_main(newest_step(folder) if world.is_main else 0)
    if step:
        # A private search keeps each trial's in a folder below; which trial it goes on with is not said.
        run = folder.parent if folder.name == "checkpoints" else folder.parent.parent
        log.info("going on from step %d of %s", step, run.name)
    return step


def _seal(folder: Path) -> None:
    (folder / _SEAL).write_text(json.dumps(file_digests(folder)))


def _is_whole(folder: Path) -> bool:
    try:
        sealed = json.loads((folder / _SEAL).read_text())
        found = file_digests(folder)
        found.pop(_SEAL)
        return bool(sealed == found)
    except (OSError, ValueError):
        return False


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _drop_old(folder: Path) -> None:
    for old in sorted(folder.glob("step-*"), key=_step_of)[:-_KEEP]:
        shutil.rmtree(old)
