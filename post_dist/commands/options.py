"""The options and arguments that commands share."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

import typer

from post_dist.errors import InputError


class Resume(StrEnum):
    """What to do with an unfinished run of the same settings."""

    auto = "auto"
    never = "never"

    @property
    def mode(self) -> Literal["auto", "never"]:
        """The value that the API takes."""
        return "auto" if self is Resume.auto else "never"


class Submittable(StrEnum):
    """What `submit` can start: a stage, or the pipeline."""

    corpus = "corpus"
    signals = "signals"
    distill = "distill"
    warm_start = "warm-start"
    tune = "tune"
    transfer = "transfer"
    evaluate = "evaluate"
    pipeline = "pipeline"


RunFile = Annotated[
    Path, typer.Argument(metavar="RUN.yaml", help="The run file; `post-dist init` writes one.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a field, such as transfer.alpha=0.5."),
]
Output = Annotated[
    Path | None,
    typer.Option("--output", help="Folder for the runs; replaces `output` of the run file."),
]
ResumeOption = Annotated[
    Resume,
    typer.Option("--resume", help="auto: resume from the last checkpoint. never: start over."),
]
TrustModel = Annotated[
    bool,
    typer.Option(
        "--trust-model",
        help="Accept your own model as inputs.student: without post_dist.json, it is not checked.",
    ),
]
TrustedKeys = Annotated[
    list[str] | None,
    typer.Option(
        "--key",
        metavar="KEY",
        help="A trusted public key: a .pub file, or its line. Several are allowed.",
    ),
]
Epsilon = Annotated[
    float | None,
    typer.Option(
        min=1e-3, help="Tune privately with this target; sets privacy.enabled and target_epsilon."
    ),
]
Minutes = Annotated[
    float | None,
    typer.Option(
        min=0.01,
        max=1e6,
        help="Choose batch size and steps for a private run of so many minutes on this machine. "
        "For a prompt, also choose length, rate and C where the run file leaves them open.",
    ),
]
AsJson = Annotated[
    bool,
    typer.Option(
        "--json", help="Print one JSON object on standard output, and nothing else there."
    ),
]


def with_trust(overrides: list[str] | None, trust_model: bool) -> list[str]:
    """Return the overrides of a run file with that of `--trust-model`."""
    trust = ["inputs.trust_model=true"] if trust_model else []
    return [*(overrides or ()), *trust]


def with_epsilon(overrides: list[str] | None, epsilon: float | None) -> list[str]:
    """Return the overrides of a run file with those of `--epsilon`."""
    if epsilon is None:
        return list(overrides or ())
    target = ["privacy.enabled=true", f"privacy.target_epsilon={epsilon}"]
    return [*(overrides or ()), *target, "privacy.noise_multiplier=null"]


def counts(option: str, text: str) -> list[int]:
    """Read whole numbers above zero, separated by commas.

    Args:
        option: the option's name, for the message.
        text: the option's value.

    Raises:
        InputError: the text has another form.
    """
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = [0]
    # Text that is not a number became a zero above, so it is refused here too.
    if min(numbers) < 1:
        raise InputError(f"{option} {text}: not numbers above zero", "write them as 8,64,512")
    return numbers
