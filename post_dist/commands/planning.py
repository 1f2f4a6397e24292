"""The command that plans a run on a cluster before it is queued."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from post_dist.commands.options import AsJson, Output, Overrides, RunFile, counts
from post_dist.commands.printing import print_json
from post_dist.config.cluster import ClusterStage
from post_dist.config.load import load_run
from post_dist.config.precision import Precision
from post_dist.config.schema import RunConfig
from post_dist.errors import InputError
from post_dist.report.tables import print_wide

if TYPE_CHECKING:
    from post_dist.models.size import ModelSize
    from post_dist.planning.hardware import Hardware, Machine


_SHARDED: tuple[ClusterStage, ...] = ("warm_start", "transfer", "evaluate")
"""Stages beside `distill` whose jobs may have many nodes."""


def plan(  # noqa: PLR0913 - typer reads the options from parameters
    run: RunFile,
    nodes: Annotated[
        int | None, typer.Option(min=1, help="Number of nodes; default: that of `cluster`.")
    ] = None,
    gpus_per_node: Annotated[
        int | None,
        typer.Option(
            min=1, help="GPUs on each node; default: from `cluster`, or from the hardware file."
        ),
    ] = None,
    gpu: Annotated[str, typer.Option(help="Name of the GPU in the hardware file.")] = "h100",
    hardware: Annotated[
        Path | None, typer.Option(help="Your hardware file; it replaces entries of the same name.")
    ] = None,
    sweep: Annotated[
        str | None,
        typer.Option(metavar="N,N,...", help="Also plan these numbers of GPUs, and plot them."),
    ] = None,
    set_: Overrides = None,
    output: Output = None,
    json_: AsJson = False,
) -> None:
    """Estimate memory, bytes, time and conflicts on a cluster. Needs no GPU and no weights."""
    config = load_run(run, set_, output)
    from post_dist.models.load import config_folder
    from post_dist.models.size import size_of
    from post_dist.planning.hardware import Machine, read_hardware
    from post_dist.planning.inputs import needed_sections
    from post_dist.planning.scaling import draw

    # Read the hardware file before the model: a misspelled GPU should not cost a download.
    section, _, _ = needed_sections(config)
    described = read_hardware(gpu, hardware)
    requested = config.cluster.for_stage("distill")
    of_node = gpus_per_node or requested.gpus_per_node or described.node.gpus
    # With --nodes, all stages have these nodes.
    of_stage = {} if nodes else {stage: config.cluster.for_stage(stage).nodes for stage in _SHARDED}
    machine = Machine(nodes or requested.nodes, of_node, described, of_stage)
    gpus = counts("--sweep", sweep) if sweep else []
    teacher = size_of(config_folder(section))
    result = _plan(config, teacher, machine, gpus) | {"gpu": gpu}
    # If the plot cannot be written, the table is already printed. JSON is the plan or the error.
    if not json_:
        _print_plan(result)
    if sweep:
        title = f"{config.name} on {gpu} (a model, not a measurement)"
        draw(result["sweep"], title, result["figure"])
    if json_:
        print_json(result)
    # A script can tell from the exit code that the run cannot work as planned.
    if result["conflicts"]:
        raise typer.Exit(InputError.exit_code)


def _plan(
    config: RunConfig, teacher: "ModelSize", machine: "Machine", sweep: Sequence[int]
) -> dict[str, Any]:
    """Plan the run on a machine, and on each number of GPUs of the sweep."""
    from post_dist.planning.plan import nearest_that_fits, plan_run
    from post_dist.planning.scaling import planned
    from post_dist.planning.simulation import goodput

    precision = _precision(config, machine.hardware)
    result = plan_run(config, teacher, machine, precision)
    (distill,) = (stage for stage in result["stages"] if stage["stage"] == "distill")
    result["long_run"] = goodput(distill)
    # Both are computed only on demand, because each plans the run many times.
    if sweep:
        result["sweep"] = planned(config, teacher, machine, precision, sweep)
        result["figure"] = config.output / config.name / "plan.png"
    if not all(stage["fits"] for stage in result["stages"]):
        result["nearest_that_fits"] = nearest_that_fits(config, teacher, machine, precision)
    return result


def _precision(config: RunConfig, hardware: "Hardware") -> Precision:
    """Return the precision that the run would choose on this GPU."""
    wanted = config.engine.precision
    if wanted != "auto":
        return wanted
    return "bf16" if "bf16" in hardware.teraflops else "fp32"


def _print_plan(result: dict[str, Any]) -> None:
    from post_dist.planning.table import plan_lines, plan_table, plan_verdict

    for line in plan_verdict(result):
        print(line)
    print_wide(plan_table(result))
    for line in plan_lines(result):
        print(line)
