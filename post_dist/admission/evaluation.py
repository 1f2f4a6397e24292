"""Check the table of an evaluation, which may come from another party."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from post_dist.admission.quarantine import Quarantined
from post_dist.artifacts.evaluation_table import TABLE_FILE
from post_dist.artifacts.strict_json import read_object
from post_dist.errors import ArtifactRefused

_Share = Annotated[float, Field(ge=-0.01, le=1.01)]
"""A proportion. The ends of an interval may be rounded."""


class _Checked(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class _Row(_Checked):
    """What the pages read of a row."""

    name: Annotated[str, Field(max_length=200)]
    n: Annotated[int, Field(ge=0, le=10**12)]
    epsilon: Annotated[float, Field(ge=0)] | None
    interval_95: Annotated[list[_Share], Field(min_length=2, max_length=2)]


class _ClassRow(_Row):
    accuracy_micro: _Share
    accuracy_macro: _Share
    auc: _Share | None


class _ResponseRow(_Row):
    exact_match: _Share
    rouge_1: _Share
    rouge_l: _Share


_Rows = Annotated[list[_ClassRow], Field(min_length=1, max_length=1000)]
_ResponseRows = Annotated[list[_ResponseRow], Field(min_length=1, max_length=1000)]


class _Table(_Checked):
    """What the pages read of a table."""

    task: Annotated[str, Field(max_length=1000)]
    split: Annotated[str, Field(max_length=100)]
    test_readings: Annotated[int, Field(ge=1, le=10**9)] = 1
    rows: _Rows | _ResponseRows


def checked_table(inside: Quarantined) -> dict[str, Any]:
    """Read the table of a quarantined evaluation, as `post-dist evaluate --json` prints it.

    Raises:
        ArtifactRefused: the folder is not what `evaluate` has written.
    """
    if inside.manifest.kind != "evaluation":
        raise ArtifactRefused(f"it is a {inside.manifest.kind}, not an evaluation")
    if TABLE_FILE not in inside.manifest.files:
        raise ArtifactRefused(f"it has no {TABLE_FILE}")
    # The size of the file is limited by the quarantine.
    table = read_object(inside.folder / TABLE_FILE)
    try:
        _Table.model_validate(table)
    except ValidationError as error:
        place = ".".join(map(str, error.errors()[0]["loc"]))
        raise ArtifactRefused(f"{TABLE_FILE} is not a table of `evaluate`: {place}") from None
    return table
