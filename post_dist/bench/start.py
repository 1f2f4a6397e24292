"""Start a benchmark: join the ranks, find the models of the run file, and measure."""

from functools import partial
from pathlib import Path
from typing import Any, Literal

from post_dist.config.schema import RunConfig
from post_dist.errors import InputError
from post_dist.files import check_writable
from post_dist.runtime.ranks import join_ranks

BenchStage = Literal["distill", "tune", "transfer"]


def bench_stage(stage: BenchStage, config: RunConfig) -> dict[str, Any]:
    """Compare a step of a stage with other implementations, on one device.

    Raises:
        InputError: there are several ranks, or a section is missing.
    """
    world = join_ranks(config)
    if world.size > 1:
        raise InputError(
            f"bench {stage} compares ways to run a step on one device",
            "start it without a launcher",
        )
    # A pipeline that may not run a stage only finds models. It raises if one is not finished.
    from post_dist.stages.pipeline import Pipeline

    stages = Pipeline(config, world, frozenset())
    if stage == "tune":
        from post_dist.bench.tune import bench_tune

        return bench_tune(config, stages.student, world)
    if stage == "distill":
        from post_dist.bench.distill import bench_distill

        return bench_distill(config, stages.inputs.teacher, world)
    from post_dist.bench.transfer import bench_transfer

    return bench_transfer(config, stages.inputs.teacher, stages.student, world)


def bench_scale_of(config: RunConfig, write: Path | None = None) -> dict[str, Any]:
    """Measure a step of distill and of transfer. All ranks of a launcher call it.

    Args:
        config: the run file.
        write: the file to which rank 0 writes the measurement, for `post-dist report`.

    Raises:
        InputError: a section is missing, or the file cannot be written.
    """
    world = join_ranks(config)
    from post_dist.bench.scale import bench_scale, write_scale
    from post_dist.stages.run_inputs import RunInputs

    if write is not None:
        world.on_main(partial(check_writable, write))
    result = bench_scale(config, RunInputs(config, world).teacher, world)
    if write is not None and world.is_main:
        write_scale(write, result)
    return result


def bench_fabric(write: Path | None = None) -> dict[str, Any]:
    """Measure the rates that the machine reaches. All ranks of a launcher call it.

    Args:
        write: the hardware file that rank 0 writes for `post-dist plan --hardware`.

    Raises:
        InputError: the file cannot be written.
    """
    world = join_ranks(RunConfig(name="fabric"))
    from post_dist.bench.fabric import measure_fabric, write_hardware

    if write is not None:
        world.on_main(partial(check_writable, write))
    result = measure_fabric(world)
    if write is not None and world.is_main:
        write_hardware(write, result)
    return result
