"""The kinds of options and arguments that commands share."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Resume(StrEnum):
    """What to do with an unfinished run of the same settings."""

    auto = "auto"
    never = "never"


class Bench(StrEnum):
    """The stages that have a benchmark, and the machine itself."""

    distill = "distill"
    tune = "tune"
    transfer = "transfer"
    fabric = "fabric"


class Submittable(StrEnum):
    """What can be submitted."""

    distill = "distill"
    tune = "tune"
    transfer = "transfer"
    evaluate = "evaluate"
    pipeline = "pipeline"


RunFile = Annotated[Path, typer.Argument(metavar="RUN.yaml", help="The run file; `post-dist init` writes one.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a field, such as transfer.alpha=0.5.")]
Output = Annotated[Path | None, typer.Option("--output", help="Folder for the runs, instead of the run file's own.")]
ResumeOption = Annotated[Resume, typer.Option("--resume", help="Go on from a checkpoint, or start the stage anew.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output, and nothing else there.")]
