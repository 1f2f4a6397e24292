"""The commands `ls`, `status` and `clean`: which runs there are, how far, and what to remove."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from post_dist.commands.options import AsJson
from post_dist.commands.printing import print_json

if TYPE_CHECKING:
    from post_dist.report.runs import RunProgress


def ls(
    folder: Annotated[Path, typer.Argument(metavar="[DIR]", help="Folder of the runs.")] = Path(
        "runs"
    ),
    json_: AsJson = False,
) -> None:
    """List the runs and artifacts below a folder."""
    from post_dist.artifacts.card import plain
    from post_dist.report.runs import runs_below

    found = runs_below(folder)
    if json_:
        print_json({"runs": [asdict(run) for run in found]})
        return
    for run in found:
        epsilon = "" if run.epsilon is None else f"epsilon {run.epsilon:.2f}"
        date = run.date[:16].replace("T", " ")
        print(plain(f"{run.stage:<14} {run.state:<10} {epsilon:<14} {date}  {run.path}"))


def status(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run, such as runs/demo.")],
    json_: AsJson = False,
) -> None:
    """Show how far each stage of a run is, from another terminal."""
    from post_dist.artifacts.card import plain
    from post_dist.report.runs import progress_below

    progress = progress_below(run)
    if json_:
        print_json({"stages": [asdict(stage) for stage in progress]})
        return
    for stage in progress:
        print(plain(f"{stage.run}: {_progress_text(stage)}"))


def clean(
    folder: Annotated[Path, typer.Argument(metavar="[DIR]", help="Folder of the runs.")] = Path(
        "runs"
    ),
    yes: Annotated[bool, typer.Option("--yes", help="Remove without asking.")] = False,
    json_: AsJson = False,
) -> None:
    """List unfinished runs and caches below a folder, and remove them if you say yes."""
    from post_dist.artifacts.card import plain
    from post_dist.report.leftovers import leftovers, remove

    found = leftovers(folder)
    # Only a terminal can answer. A script says --yes, or gets the list.
    agreed = yes
    if not json_:
        for leftover in found:
            print(plain(f"{leftover.mib:>10.1f} MiB  {leftover.what:<22}  {leftover.path}"))
        print(f"{sum(leftover.mib for leftover in found):>10.1f} MiB  in all")
        if found and not yes and sys.stdin.isatty():
            agreed = typer.confirm("Remove them? What they spent stays in the ledgers.")
    if agreed:
        for leftover in found:
            remove(leftover)
    if json_:
        print_json({"removed": agreed, "leftovers": [asdict(leftover) for leftover in found]})
    elif found and not agreed:
        print("nothing was removed; --yes removes them")


def _progress_text(stage: "RunProgress") -> str:
    """Return the known numbers of a stage."""
    parts = [stage.state]
    if stage.step is not None:
        parts.append(f"step {stage.step} of {stage.steps}")
    if stage.steps_per_second is not None:
        parts.append(f"{stage.steps_per_second:.3g} steps/s")
    if stage.seconds_left is not None:
        parts.append(f"about {stage.seconds_left:.0f} s left")
    if stage.seconds_since_write is not None:
        parts.append(f"last write {stage.seconds_since_write:.0f} s ago")
    return ", ".join(parts)
