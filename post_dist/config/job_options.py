"""Options of Slurm jobs as text: they end up in batch files, so each must stay one value."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from post_dist.config.sections import Section


def _one_line(text: str) -> str:
    """Refuse a text that would end the line of a batch file, or is none."""
    if not text.isprintable() or not text.strip():
        raise ValueError("must be one line of printable characters")
    return text


def _long_option(text: str) -> str:
    """Refuse what is no option, because srun would take it for the program to run."""
    if not text.startswith("--"):
        raise ValueError("must be a long option with its value, such as --cpu-bind=cores")
    return _one_line(text)


def _not_own(name: str) -> str:
    """Refuse an option of sbatch that another field sets, or that `submit` cannot work with."""
    if name in _OWN_OPTIONS:
        raise ValueError(f"{name} is set by post_dist: see the other fields of `cluster`")
    if name in _ANSWER_OPTIONS:
        raise ValueError(
            f"{name} changes what sbatch answers, so `submit` would not learn the job's number"
        )
    # sbatch takes the beginning of an option for the whole one.
    for own in sorted(_OWN_OPTIONS | _ANSWER_OPTIONS):
        if own.startswith(name) and name not in _OTHER_OPTIONS:
            raise ValueError(f"{name} is short for {own}, which post_dist needs as it is")
    return name


_OWN_OPTIONS = {
    "account",
    "array",
    "constraint",
    "cpus-per-task",
    "dependency",
    "error",
    "exclude",
    "exclusive",
    "gpus-per-node",
    "gpus-per-task",
    "gres",
    "job-name",
    "kill-on-invalid-dep",
    "mem",
    "nodes",
    "ntasks",
    "ntasks-per-node",
    "open-mode",
    "output",
    "partition",
    "qos",
    "requeue",
    "reservation",
    "signal",
    "time",
    "wrap",
}
"""Options of sbatch that have a field of their own, or that jobs rely on."""
_ANSWER_OPTIONS = {
    "help",
    "parsable",
    "quiet",
    "test-only",
    "usage",
    "verbose",
    "version",
    "wait",
}
"""Options of sbatch that change when and what it answers, or whether it queues the job at all."""
_OTHER_OPTIONS = {"gpus"}
"""Options of sbatch that are the beginning of one of those."""

OneLine = Annotated[str, AfterValidator(_one_line)]
"""The value of an option."""
SrunOption = Annotated[str, AfterValidator(_long_option)]
"""An option of srun with its value."""
SbatchOption = Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]*$"), AfterValidator(_not_own)]
"""The name of an option of sbatch, without dashes."""
VariableName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
"""The name of an environment variable."""
Mount = Annotated[str, Field(pattern=r"^/[^:,]*(:/[^:,]*)?$"), AfterValidator(_one_line)]
"""A folder of the node, or `FOLDER:PLACE` to give it another place in the container."""


class Container(Section):
    """The container that the tasks of a job run in. The batch script itself runs on the node."""

    runtime: Literal["pyxis", "apptainer"]
    """`pyxis`: Slurm's plugin for enroot. `apptainer`: the program on each node."""
    image: OneLine
    """Image: a name such as `registry#name:tag` or a .sqsh file for pyxis; a .sif file."""
    mounts: tuple[Mount, ...] = ()
    """Folders that the tasks see, such as `/data` or `/scratch/me:/data`: those of the run file, of
    `output` and of the data."""
    python: OneLine = "python"
    """Python of the image that post_dist is installed in."""
