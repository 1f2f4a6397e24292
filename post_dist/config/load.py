"""Load a run file: parse it, apply `--set` overrides, check it, and report every error at once."""

import difflib
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from post_dist.config.schema import RunConfig
from post_dist.config.yaml_files import read_yaml
from post_dist.errors import InputError
from post_dist.paths import kind_of

_INTERNAL_PLACES = ("function-", "literal[", "tuple[", "constrained-")
"""Prefixes of the names that pydantic gives to the alternatives of a union, in an error's place."""

_WORDINGS = {
    "tuple_type": "Input should be a list, such as [first, second]",
    "list_type": "Input should be a list, such as [first, second]",
    "dict_type": "Input should be a mapping, with a name and a value a line",
    "path_type": "Input should be a path",
    "too_short": "Input should be a list that is not empty",
    "model_type": "Input should be a section, with a field a line",
}
"""Our words for types of Python, by pydantic's name of the problem."""

_NOT_FINITE = (".inf", ".Inf", ".INF", ".nan", ".NaN", ".NAN", "inf", "nan")
_MOST_BYTES = 1 << 20
"""Size limit of a run file."""


def load_run(
    path: Path, overrides: list[str] | None = None, output: Path | None = None
) -> RunConfig:
    """Read and check a run file.

    Args:
        path: the YAML file; relative paths in it are read from its folder.
        overrides: `section.field=value` strings; each value is YAML.
        output: folder for the run folders; replaces `output` of the file.

    Raises:
        InputError: the file is missing, is not YAML, or breaks the schema. The message lists every
            error.
    """
    # Overrides and --output change the raw fields, so they are checked like the file.
    fields = _read_sections(path)
    for override in overrides or []:
        _override(fields, override)
    if output is not None:
        fields["output"] = str(output.absolute())
    try:
        return RunConfig.model_validate(fields, context={"folder": path.resolve().parent})
    except ValidationError as error:
        raise InputError(_message(path, error)) from None


def _read_sections(path: Path) -> dict[str, Any]:
    # A FIFO or a device would never end.
    kind = kind_of(path)
    if kind in ("folder", "other"):
        raise InputError(f"cannot read the run file {path}: it is not a file")
    if kind == "file" and path.stat().st_size > _MOST_BYTES:
        raise InputError(f"cannot read the run file {path}: it is above {_MOST_BYTES} bytes")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        # The full message of the system repeats the path.
        problem = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise InputError(
            f"cannot read the run file {path}: {problem}", "`post-dist init DIR` writes one"
        ) from None
    fields = read_yaml(text, str(path))
    if not isinstance(fields, dict):
        raise InputError(
            f"{path} holds no sections",
            "a run file is a YAML mapping; `post-dist init DIR` writes one",
        )
    return fields


def _override(fields: dict[str, Any], override: str) -> None:
    """Apply one `section.field=value` to the raw mapping, in place."""
    place, equals, value = override.partition("=")
    keys = place.split(".")
    if not equals or not all(keys):
        raise InputError(f"--set {override}: not of the form section.field=value")
    # Walk down to the section, and create each section that is missing.
    section = fields
    for key in keys[:-1]:
        inner = section.get(key, {})
        if not isinstance(inner, dict):
            raise InputError(f"--set {override}: '{key}' is not a section")
        # Copy it: a YAML alias may use the same mapping elsewhere.
        section[key] = dict(inner)
        section = section[key]
    section[keys[-1]] = read_yaml(value, f"--set {override}")


def _message(path: Path, error: ValidationError) -> str:
    """Return a line with the number of errors, and one line for each wrong place."""
    # For a field of several types, pydantic reports one error for each type. They share one line.
    by_place: dict[tuple[str, bool], list[Any]] = {}
    for problem in error.errors(include_url=False):
        is_unknown_key = problem["type"] == "extra_forbidden"
        by_place.setdefault((_place(problem), is_unknown_key), []).append(problem)
    lines = [f"  - {_describe(problems)}" for problems in by_place.values()]
    count = "1 error" if len(lines) == 1 else f"{len(lines)} errors"
    return "\n".join([f"{path}: {count} in the run file", *lines])


def _place(problem: Any) -> str:
    """Return the place of a problem in the file, without pydantic's names of union alternatives."""
    parts = map(str, problem["loc"])
    return ".".join(part for part in parts if not part.startswith(_INTERNAL_PLACES))


def _describe(problems: list[Any]) -> str:
    """Describe what is wrong at one place, and which values are allowed."""
    problem = problems[0]
    place = _place(problem)
    if problem["type"] == "extra_forbidden":
        return _describe_unknown_key(place, problem["loc"])
    if problem["type"] == "missing":
        return f"{place} is missing"
    message = _wording(problem)
    for alternative in problems[1:]:
        message += f" or {_wording(alternative).removeprefix('Input should be ')}"
    message = f"{message[:1].lower()}{message[1:]}"

    # Messages of our own rules quote the value where it helps. Add it to pydantic's own messages.
    given = problem.get("input")
    is_scalar = isinstance(given, str | int | float | bool | None)
    if is_scalar and problem["type"] != "value_error":
        message += f" (found {given!r:.60})"
    return f"{place or 'run file'}: {message}"


def _wording(problem: Any) -> str:
    """Return pydantic's message, in words of YAML in place of Python's types."""
    if problem["type"] == "float_parsing" and str(problem["input"]).lstrip("+-") in _NOT_FINITE:
        return "Input should be a finite number"
    message: str = _WORDINGS.get(problem["type"], problem["msg"])
    return message.removeprefix("Value error, ")


def _describe_unknown_key(place: str, location: tuple[int | str, ...]) -> str:
    # Most unknown keys are misspelled, so suggest the nearest allowed key.
    allowed = sorted(_fields_at(location[:-1]))
    message = f"{place}: unknown key"
    near = difflib.get_close_matches(str(location[-1]), allowed, n=1)
    if near:
        message += f"; did you mean '{near[0]}'?"
    return f"{message} (allowed: {', '.join(allowed)})"


def _fields_at(location: tuple[int | str, ...]) -> set[str]:
    """Return the field names of the section at a location."""
    section: type[BaseModel] = RunConfig
    for part in location:
        annotation = section.model_fields[str(part)].annotation
        # The annotation is a section, or a union of a section and None.
        for candidate in (annotation, *get_args(annotation)):
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                section = candidate
                break
    return set(section.model_fields)
