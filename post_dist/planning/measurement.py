"""Read the files that `bench scale --write` writes. They may come from another party."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from post_dist.artifacts.strict_json import parse_object
from post_dist.config.sections import steers_terminal
from post_dist.errors import InputError

_MOST_BYTES = 64 << 20
"""Size limit of a file. That of 10,000 ranks has 10 MB."""

_Amount = Annotated[float, Field(ge=1e-12, le=1e18)]
"""A rate or a time. Quotients of two of them are finite."""


def _plain(text: str) -> str:
    if steers_terminal(text):
        raise ValueError("holds control characters")
    return text


class _Checked(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class _Step(_Checked):
    scaling: Literal["strong", "weak"]
    step_seconds: _Amount
    straggler: Annotated[str, Field(max_length=300), AfterValidator(_plain)] | None


class _DistillStep(_Step):
    stage: Literal["distill"]
    tokens_per_second: _Amount


class _TransferStep(_Step):
    stage: Literal["transfer"]
    samples_per_second: _Amount


class Measurement(_Checked):
    """What the pages read of a measurement.

    Attributes:
        ranks: number of ranks.
        rows: a step of each stage with each kind of scaling. On one rank, both kinds are one.
    """

    ranks: Annotated[int, Field(ge=1, le=10**6)]
    rows: Annotated[
        list[Annotated[_DistillStep | _TransferStep, Field(discriminator="stage")]],
        Field(max_length=4),
    ]


def read_measurement(path: Path) -> Measurement:
    """Read a file that `bench scale --write` has written.

    Raises:
        InputError: it is something else.
    """
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError(f"larger than {_MOST_BYTES} bytes")
        found = Measurement.model_validate(parse_object(path.read_bytes()))
        # A stage that is missing, or there twice, would give a wrong point of the plot.
        measured = sorted((row.stage, row.scaling) for row in found.rows)
        scalings = ["strong"] if found.ranks == 1 else ["strong", "weak"]
        if measured != [(stage, kind) for stage in ("distill", "transfer") for kind in scalings]:
            raise ValueError("rows")
    except ValidationError as error:
        # The value itself could steer the terminal.
        raise _refusal(path, ".".join(map(str, error.errors()[0]["loc"]))) from None
    except OSError as error:
        raise _refusal(path, error.strerror or "it cannot be read") from None
    except ValueError as error:
        raise _refusal(path, str(error)) from None
    return found


def _refusal(path: Path, problem: str) -> InputError:
    return InputError(
        f"{path} is not a measurement of steps: {problem}",
        "`post-dist bench scale RUN.yaml --write FILE` makes one",
    )
