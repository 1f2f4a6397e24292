"""What a run takes on a cluster, before it is queued."""

import json
from pathlib import Path
from typing import Annotated

import typer

from post_dist.commands.options import AsJson, Output, Overrides, RunFile, counts
from post_dist.commands.printing import print_wide
from post_dist.config.load import load_run
from post_dist.errors import InputError


def plan(
    run: RunFile,
    nodes: Annotated[int, typer.Option(min=1, help="How many nodes.")] = 1,
    gpus_per_node: Annotated[
        int | None, typer.Option(min=1, help="GPUs of each; else as the hardware file says.")
    ] = None,
    gpu: Annotated[str, typer.Option(help="Which GPU, by its name in the hardware file.")] = "h100",
    hardware: Annotated[
        Path | None, typer.Option(help="A hardware file whose entries come before ours.")
    ] = None,
    sweep: Annotated[
        str | None,
        typer.Option(metavar="N,N,...", help="Also reckon these numbers of GPUs, and draw them."),
    ] = None,
    set_: Overrides = None,
    output: Output = None,
    json_: AsJson = False,
) -> None:
    """What the run takes on a cluster: memory, bytes, time, scaling and conflicts; needs no GPU and no weights."""
    config = load_run(run, set_, output)
    from post_dist.models.load import config_folder
    from post_dist.models.size import size_of
    from post_dist.planning.hardware import Machine, read_hardware
    from post_dist.planning.plan import nearest_that_fits, plan_run
    from post_dist.planning.scaling import draw, planned
    from post_dist.planning.simulation import goodput
    from post_dist.planning.table import plan_lines, plan_table

    if config.teacher is None:
        raise InputError("plan needs the section `teacher`")
    of_gpu = read_hardware(gpu, hardware)
    machine = Machine(nodes, gpus_per_node or of_gpu.node.gpus, of_gpu)
    wanted = config.engine.precision
    precision = (
        wanted if wanted != "auto" else ("bf16" if "bf16" in machine.hardware.teraflops else "fp32")
    )
    teacher = size_of(config_folder(config.teacher))
    result = plan_run(config, teacher, machine, precision) | {"gpu": gpu}
    result["long_run"] = goodput(result["stages"][0])
    if sweep:
        result["sweep"] = planned(config, teacher, machine, precision, counts("--sweep", sweep))
        result["figure"] = str(config.output / config.name / "plan.png")
    if not all(stage["fits"] for stage in result["stages"]):
        result["nearest_that_fits"] = nearest_that_fits(config, teacher, machine, precision)
    if json_:
        print(json.dumps(result))
    else:
        print_wide(plan_table(result))
        print(*plan_lines(result), sep="\n")
    if sweep:
        draw(
            result["sweep"],
            f"{config.name} on {gpu} (a model, not a measurement)",
            Path(result["figure"]),
        )
    if result["conflicts"]:
        raise typer.Exit(InputError.exit_code)
