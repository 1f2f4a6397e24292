"""Checkpoints of a run. Those of a prompt are here, those of an engine in engine_checkpoint.py.

Each checkpoint is written to a temporary folder with the sha256 of each of its files. The folder is
then flushed and renamed. A run resumes from the newest checkpoint with unchanged files. The two
newest are kept.
"""

import json
import logging
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from post_dist.artifacts.strict_json import read_small
from post_dist.files import file_digests, write_folder
from post_dist.runtime.checkpoint_folders import checkpoint_folders, step_of
from post_dist.runtime.distributed import World

log = logging.getLogger(__name__)

KEEP = 2
"""Number of checkpoints to keep. If the newest is damaged, the run resumes from the one before."""
_TENSORS = "state.safetensors"
SEAL = "checkpoint.json"
_MOST_SEAL_BYTES = 16 << 20
"""Size of the seal of a checkpoint of 150,000 ranks."""


def newest_step(folder: Path) -> int:
    """Return the step of the newest undamaged checkpoint, or 0 if there is none.

    A damaged checkpoint is named in the log and deleted.
    """
    return _newest(checkpoint_folders(folder), is_whole, _discard)


def save_tensors(folder: Path, step: int, tensors: dict[str, torch.Tensor]) -> None:
    """Save a few small tensors, such as a prompt and the moments of its optimizer.

    Args:
        folder: the folder of all checkpoints.
        step: the next step of the run.
        tensors: the tensors to save, by name.

    Raises:
        InputError: the folder cannot be written to.
        EnvironmentFault: the disk is full.
    """

    def fill(partial: Path) -> None:
        on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(on_cpu, partial / _TENSORS)
        seal(partial)

    write_folder(folder / f"step-{step}", fill)
    drop_old(folder)


def load_tensors(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """Load the tensors of the checkpoint at `step`."""
    return load_file(folder / f"step-{step}" / _TENSORS)


def optimizer_state(
    parameters: Sequence[torch.Tensor], optimizer: torch.optim.Optimizer
) -> dict[str, torch.Tensor]:
    """Collect the values of a few parameters and the optimizer's tensors for each of them."""
    state = {}
    # The parameters of a prompt have no names, so they are numbered.
    for index, parameter in enumerate(parameters):
        state[f"{index}"] = parameter
        for name, value in optimizer.state[parameter].items():
            # SGD without momentum has None as its state.
            if value is not None:
                state[f"{index}.{name}"] = value
    return state


def restore_optimizer(
    parameters: Sequence[torch.Tensor],
    optimizer: torch.optim.Optimizer,
    saved: dict[str, torch.Tensor],
) -> None:
    """Set parameters and optimizer to a state from `optimizer_state`.

    Args:
        parameters: the same parameters, in the same order.
        optimizer: an optimizer of the same kind.
        saved: the saved state.
    """
    for index, parameter in enumerate(parameters):
        with torch.no_grad():
            parameter.copy_(saved[f"{index}"])
        state = {}
        for key, value in saved.items():
            owner, _, name = key.partition(".")
            if owner != f"{index}" or not name:
                continue
            # torch keeps Adam's step count on the CPU, wherever the parameter is.
            state[name] = value if name == "step" else value.to(parameter)
        optimizer.state[parameter] = state


def restore_newest(
    parameters: Sequence[torch.Tensor],
    optimizer: torch.optim.Optimizer,
    folder: Path,
    resume: str,
    world: World,
) -> int:
    """Set parameters and optimizer to the newest checkpoint if one exists.

    Args:
        parameters: the trained parameters.
        optimizer: their optimizer.
        folder: the folder of all checkpoints.
        resume: `auto`, or `never` to delete earlier checkpoints.
        world: the ranks, which all call this function.

    Returns:
        The step to start from; 0 without a checkpoint.
    """
    step = start_step(folder, resume, world)
    if step:
        restore_optimizer(parameters, optimizer, load_tensors(folder, step))
    return step


def start_step(
    folder: Path, resume: str, world: World, whole: Callable[[Path], bool] | None = None
) -> int:
    """Return the step to start from. With `resume` of `never`, earlier checkpoints are deleted.

    Args:
        folder: the folder of all checkpoints.
        resume: `auto`, or `never`.
        world: the ranks, which all call this function.
        whole: returns whether a checkpoint is undamaged. All ranks call it. By default, rank 0
            reads all files.
    """

    def read_by_main(path: Path) -> bool:
        return world.on_main(partial(is_whole, path))

    def discard(path: Path) -> None:
        world.on_main(partial(_discard, path))

    # Only rank 0 lists the folder, because other ranks could see it half deleted.
    if world.is_main and resume == "never":
        shutil.rmtree(folder, ignore_errors=True)
    found = world.from_main(checkpoint_folders(folder) if world.is_main else [])
    step = _newest(found, whole or read_by_main, discard)
    if step:
        # A private search keeps the checkpoints of each trial in a subfolder. The number of trials
        # is private, so the message names only the run.
        run = folder.parent if folder.name == "checkpoints" else folder.parent.parent
        log.info("resuming from step %d of %s", step, run.name)
    return step


def seal(folder: Path, digests: dict[str, str] | None = None) -> None:
    """Write the sha256 of each file of a folder into it.

    Args:
        folder: a checkpoint, or what a run made before its first one.
        digests: the digests by name, if they are known.
    """
    (folder / SEAL).write_text(json.dumps(digests or file_digests(folder)))


def sealed_digests(folder: Path) -> dict[str, str] | None:
    """Return the digests in a folder's seal, or None if it has no seal that can be read."""
    try:
        sealed = read_small(folder / SEAL, _MOST_SEAL_BYTES)
    except (OSError, ValueError):
        return None
    return sealed if all(isinstance(digest, str) for digest in sealed.values()) else None


def is_whole(folder: Path) -> bool:
    """Return whether the files of a sealed folder are unchanged since they were sealed."""
    sealed = sealed_digests(folder)
    if sealed is None:
        return False
    # NFS keeps hidden files for processes that read them.
    found = file_digests(folder, hidden=False)
    # The seal does not hold its own hash.
    found.pop(SEAL)
    return sealed == found


def _newest(
    newest_first: list[Path], whole: Callable[[Path], bool], discard: Callable[[Path], None]
) -> int:
    """Return the step of the first undamaged checkpoint, and discard those before it."""
    for path in newest_first:
        if whole(path):
            return step_of(path)
        discard(path)
    return 0


def _discard(path: Path) -> None:
    log.warning("%s is damaged: going back to the checkpoint before it", path)
    shutil.rmtree(path)


def drop_old(folder: Path) -> None:
    """Delete all checkpoints in a folder but the newest ones."""
    for old in checkpoint_folders(folder)[KEEP:]:
        shutil.rmtree(old)
