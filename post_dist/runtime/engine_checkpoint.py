"""Checkpoints of a training engine: the state of the student in one file per rank."""

import shutil
from pathlib import Path

import deepspeed
from safetensors.torch import save_file

from post_dist.files import file_digest, put_in_place, writing
from post_dist.runtime.checkpoint import drop_old, seal
from post_dist.runtime.distributed import World
from post_dist.runtime.engine_state import engine_state, restore_engine
from post_dist.runtime.watchdog import phase


def save_engine(folder: Path, step: int, engine: deepspeed.DeepSpeedEngine, world: World) -> None:
    """Save the trained weights and the optimizer of an engine. All ranks call it together.

    Args:
        folder: the folder of all checkpoints.
        step: the next step of the run.
        engine: a training engine.
        world: the ranks.

    Raises:
        InputError: a rank cannot write; earlier checkpoints are unchanged.
        EnvironmentFault: the disk is full; earlier checkpoints are unchanged.
    """
    place = folder / f"step-{step}"
    partial = folder / f".step-{step}.partial"
    phase(f"writing the checkpoint of step {step}")

    def make_room() -> None:
        with writing(place):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)

    def write() -> dict[str, str]:
        tensors = engine_state(engine)
        if not tensors:
            return {}
        file = partial / f"rank{world.rank}.safetensors"
        with writing(place):
            save_file(tensors, file)
            # Rank 0 alone would need a minute to hash the files of a large student.
            return {file.name: file_digest(file)}

    def finish() -> None:
        with writing(place):
            seal(partial, digests)
            put_in_place(partial, place)
        drop_old(folder)

    try:
        world.on_main(make_room)
        # This call returns when every rank has written, so rank 0 seals complete files.
        digests = world.merged(world.together(write))
        world.on_main(finish)
    finally:
        # After a failure, the temporary folder is of no use.
        if world.is_main:
            shutil.rmtree(partial, ignore_errors=True)


def load_engine(folder: Path, step: int, engine: deepspeed.DeepSpeedEngine) -> None:
    """Set an engine to the checkpoint at `step`. All ranks call it.

    The number of ranks may differ from that of the run that saved it.
    """
    restore_engine(engine, sorted((folder / f"step-{step}").glob("*.safetensors")))
