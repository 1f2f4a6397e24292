"""The base class of all sections of the run file, and common types of their fields."""

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo


def beside_run_file(path: Path, info: ValidationInfo) -> Path:
    """Resolve a relative path from the folder of the run file, not from the working directory."""
    folder = (info.context or {}).get("folder", Path())
    try:
        return (folder / path.expanduser()).resolve()
    except RuntimeError as error:
        # The home folder's user does not exist, or symbolic links form a loop.
        raise ValueError(f"{path}: {error}") from None


FilePath = Annotated[Path, AfterValidator(beside_run_file)]
PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """Base class of all sections. Sections are frozen, and every unknown key is an error."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False
    )
