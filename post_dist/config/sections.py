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

_STEERING = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def beside_run_file(path: Path, info: ValidationInfo) -> Path:
    """Resolve a relative path from the folder of the run file, not from the working directory."""
    folder = (info.context or {}).get("folder", Path())
    try:
        return (folder / path.expanduser()).resolve()
    except RuntimeError as error:
        # The home folder's user does not exist, or symbolic links form a loop.
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


FilePath = Annotated[Path, AfterValidator(beside_run_file)]
PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
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
        field = cls.model_fields[str(info.field_name)]
        if isinstance(value, bool) and _is_number(field.annotation):
            raise ValueError(f"is a number, not {str(value).lower()}")
        return value


def _is_number(annotation: Any) -> bool:
    """Return whether a field holds numbers alone, or nothing."""
    if annotation in (int, float):
        return True
    # A union, or a number with limits. Its other arguments are the limits.
    parts = [part for part in get_args(annotation) if part is not type(None)]
    return bool(parts) and _is_number(parts[0]) and bool not in parts
