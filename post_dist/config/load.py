"""From a YAML file and `--set` overrides to a checked run file; all that is wrong is said at once."""

import difflib
import re
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from post_dist.config.schema import RunConfig
from post_dist.errors import InputError


def load_run(
    path: Path, overrides: list[str] | None = None, output: Path | None = None
) -> RunConfig:
    """Read and check a run file.

    Args:
        path: the YAML file; relative paths in it are read from its folder.
        overrides: `section.field=value` strings, the value in YAML.
        output: folder for the run folders, instead of the file's own.

    Raises:
        InputError: the file is missing, is not YAML, or breaks the schema; names each place.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"cannot read the run file {path}: {error}", "`post-dist init DIR` writes one"
        ) from None
    fields = _parse(text, str(path))
    if not isinstance(fields, dict):
        raise InputError(
            f"{path} holds no sections",
            "a run file is a YAML mapping; `post-dist init DIR` writes one",
        )
    for override in overrides or []:
        _override(fields, override)
    if output is not None:
        fields["output"] = str(output.resolve())
    try:
        return RunConfig.model_validate(fields, context={"folder": path.resolve().parent})
    except ValidationError as error:
        problems: dict[tuple[str, bool], list[Any]] = {}
        for problem in error.errors(include_url=False):
            problems.setdefault((_place(problem), problem["type"] == "extra_forbidden"), []).append(
                problem
            )
        lines = [_describe(alternatives) for alternatives in problems.values()]
        count = "1 error" if len(lines) == 1 else f"{len(lines)} errors"
        raise InputError(
            f"{path}: {count} in the run file\n" + "\n".join(f"  - {line}" for line in lines)
        ) from None


_MERGE = "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    """YAML as its users mean it: no duplicate keys, `no` is a word, and 1e-3 is a number."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """See that no key stands twice. Later `<<` brings in those of another mapping, which the mapping's own may override."""
        node = super().compose_mapping_node(anchor)
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = (
                key_node.value
                if key_node.tag == _MERGE
                else self.construct_object(key_node, deep=True)
            )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key}' stands twice", key_node.start_mark
                )
            seen.add(key)
        return node


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern)
        for tag, pattern in resolvers
        if tag not in ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:float")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|false)$"), list("tf"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$"),
    list("-+0123456789."),
)


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, TypeError, ValueError) as error:
        raise InputError(f"{where} is not valid YAML: {error}") from None


def _override(fields: dict[str, Any], override: str) -> None:
    """Apply one `section.field=value` to the raw mapping, in place."""
    place, equals, value = override.partition("=")
    keys = place.split(".")
    if not equals or not all(keys):
        raise InputError(f"--set {override}: not of the form section.field=value")
    target = fields
    for key in keys[:-1]:
        inner = target.get(key, {})
        if not isinstance(inner, dict):
            raise InputError(f"--set {override}: '{key}' is not a section")
        target[key] = dict(inner)  # an alias may name the same mapping elsewhere
        target = target[key]
    target[keys[-1]] = _parse(value, f"--set {override}")


def _place(problem: Any) -> str:
    """Where in the file, without the names of the kinds that pydantic tried there."""
    return ".".join(
        str(part)
        for part in problem["loc"]
        if not str(part).startswith(("function-", "literal[", "tuple[", "constrained-"))
    )


def _describe(alternatives: list[Any]) -> str:
    """One line for a place: what is wrong, and what would be right; several errors where it may be of several kinds."""
    problem, place = alternatives[0], _place(alternatives[0])
    message = problem["msg"].removeprefix("Value error, ")
    message += "".join(
        f" or {other['msg'].removeprefix('Input should be ')}" for other in alternatives[1:]
    )
    if problem["type"] == "extra_forbidden":
        allowed = sorted(_fields_at(problem["loc"][:-1]))
        near = difflib.get_close_matches(str(problem["loc"][-1]), allowed, n=1)
        guess = f"; did you mean '{near[0]}'?" if near else ""
        return f"{place}: unknown key{guess} (allowed: {', '.join(allowed)})"
    if problem["type"] == "missing":
        return f"{place}: is missing"
    given = problem.get("input")
    shown = (
        f" (found {given!r:.60})"
        if isinstance(given, str | int | float | bool | None) and problem["type"] != "value_error"
        else ""
    )
    return f"{place or 'run file'}: {message[:1].lower()}{message[1:]}{shown}"


def _fields_at(place: tuple[int | str, ...]) -> set[str]:
    """The field names of the section at `place`."""
    model: type[BaseModel] = RunConfig
    for part in place:
        annotation = model.model_fields[str(part)].annotation
        model = next(
            kind
            for kind in (annotation, *get_args(annotation))
            if isinstance(kind, type) and issubclass(kind, BaseModel)
        )
    return set(model.model_fields)
