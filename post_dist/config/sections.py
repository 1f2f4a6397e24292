"""The base class of all sections of the run file, and common types of their fields."""

import re
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
)

_INT_LIMIT = 2**63
_FLOAT_LIMIT = 1e30
_STEERING = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def beside_run_file(path: Path, info: ValidationInfo) -> Path:
    """Resolve a relative path from the folder of the run file, not from the working directory."""
    folder = (info.context or {}).get("folder", Path())
    try:
        return (folder / path.expanduser()).resolve()
    except (RuntimeError, OSError, ValueError) as error:
        # The home folder's user does not exist, symbolic links form a loop, or no file has such a
        # name.
        raise ValueError(f"{path}: {error}") from None


def steers_terminal(text: str, *, lines: bool = False) -> bool:
    """Return whether a text holds characters that a terminal acts on when it shows them.

    These are control characters, and those that turn the direction of writing.

    Args:
        text: the text.
        lines: whether line breaks and tabs are allowed.
    """
    # A template may have several lines. A label word that has them could forge a line of a message.
    allowed = "\n\r\t" if lines else ""
    return any(_STEERING.match(each) and each not in allowed for each in text)


def _countable(number: int) -> int:
    if number >= _INT_LIMIT:
        raise ValueError("is 2^63 or more, which no tensor and no file can have")
    return number


def _computable(number: float) -> float:
    if number > _FLOAT_LIMIT:
        raise ValueError("is above 1e30: products with it would leave the range of fp32")
    return number


FilePath = Annotated[Path, AfterValidator(beside_run_file)]
FilePaths = Annotated[tuple[FilePath, ...], Field(min_length=1)]
PositiveInt = Annotated[int, Field(gt=0), AfterValidator(_countable)]
Count = Annotated[int, Field(ge=0), AfterValidator(_countable)]
Length = Annotated[int, Field(ge=8), AfterValidator(_countable)]
"""Number of tokens of a text."""
PositiveFloat = Annotated[float, Field(gt=0), AfterValidator(_computable)]
Weight = Annotated[float, Field(ge=0), AfterValidator(_computable)]
Temperature = Annotated[float, Field(ge=0.01, le=1000)]
"""Divisor of logits. Far below 1, one probability is left; far above, all are equal."""
Seconds = Annotated[float, Field(gt=0, le=86_400)]
"""A wait. The collectives' own limit is two days."""
Fraction = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """Base class of all sections. Sections are frozen, and every unknown key is an error."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _not_true_for_one(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse `true` for a number, which Python would read as 1."""
        named = _named_in(cls.model_fields[str(info.field_name)].annotation)
        found = _truth_in(value)
        takes_numbers = any(isinstance(each, int) or each in (int, float) for each in named)
        # pydantic's own messages name the other types that a field takes.
        if found is not None and takes_numbers and bool not in named:
            raise ValueError(f"is a number, not {str(found).lower()}")
        return value


def _named_in(annotation: Any) -> list[Any]:
    """Return the types and the literal values that an annotation names, at any depth.

    The fields of a section inside it have their own check.
    """
    inner = [named for part in get_args(annotation) for named in _named_in(part)]
    return inner or [annotation]


def _truth_in(value: Any) -> bool | None:
    """Return the first `true` or `false` in a value, or in its lists and mappings."""
    if isinstance(value, bool):
        return value
    if isinstance(value, dict):
        value = list(value.values())
    if not isinstance(value, list | tuple):
        return None
    found = [truth for truth in map(_truth_in, value) if truth is not None]
    return found[0] if found else None
