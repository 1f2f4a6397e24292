"""Write the pages of docs/reference/ from the code: the run file, the commands, a JSON Schema.

    python docs/reference.py

A test compares the committed pages with the code.
"""

import ast
import inspect
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import typer
from pydantic import BaseModel

from post_dist.cli import app
from post_dist.config.schema import RunConfig

FOLDER = Path(__file__).resolve().parent / "reference"

_RUN_FILE = """\
# The run file

Written from the code by `python docs/reference.py`.

One YAML file describes a run. Relative paths are read from the folder of the run file. Unknown keys
are errors. `--set SECTION.FIELD=VALUE` replaces one field on the command line. `post-dist check`
lists what is wrong.

Copy the [JSON Schema](run-file.schema.json) beside your run file. If the first line of the run
file names it, an editor with a YAML language server completes the fields, explains them and marks
errors:

```yaml
# yaml-language-server: $schema=run-file.schema.json
```
"""

_COMMANDS = """\
# Commands

Written from the code by `python docs/reference.py`. `post-dist COMMAND --help` prints the same.
All commands share their [exit codes](../faq.md#exit-codes).
"""


def pages() -> dict[str, str]:
    """Return the text of each file of docs/reference/, by its name."""
    return {
        "run-file.md": run_file_page(),
        "commands.md": commands_page(),
        "run-file.schema.json": json.dumps(run_file_schema(), indent=1) + "\n",
    }


def run_file_schema() -> dict[str, Any]:
    """Return the JSON Schema of a run file, with the description of each field."""
    schema = RunConfig.model_json_schema()
    for section in places():
        for field, described in descriptions(section).items():
            _own_schema(schema, section)["properties"][field]["description"] = described
    return schema


def _own_schema(schema: dict[str, Any], section: type[BaseModel]) -> dict[str, Any]:
    return schema if section is RunConfig else schema["$defs"][section.__name__]


def places() -> dict[type[BaseModel], list[str]]:
    """Return the places of each kind of section, such as `private_task` and `public_task`."""
    found: dict[type[BaseModel], list[str]] = {RunConfig: []}
    for place, section in _inner_sections("", RunConfig):
        found.setdefault(section, []).append(place)
    return found


def _inner_sections(place: str, section: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel]]]:
    for name, field in section.model_fields.items():
        for candidate in (field.annotation, *get_args(field.annotation)):
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                inner = f"{place}.{name}".lstrip(".")
                yield inner, candidate
                yield from _inner_sections(inner, candidate)


def descriptions(section: type[BaseModel]) -> dict[str, str]:
    """Return the docstrings of a section's fields. A section inherits those of its base classes."""
    found: dict[str, str] = {}
    for base in reversed(section.__mro__):
        if issubclass(base, BaseModel) and base is not BaseModel:
            found |= _docstrings(base)
    return {name: text for name, text in found.items() if name in section.model_fields}


def _docstrings(section: type) -> dict[str, str]:
    """Return the string below each annotated name of a class."""
    body = ast.parse(inspect.getsource(section)).body[0].body
    found = {}
    for statement, following in itertools.pairwise(body):
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            found[statement.target.id] = inspect.cleandoc(following.value.value).replace("\n", " ")
    return found


def run_file_page() -> str:
    """Return the page with a table of fields for each section of the run file."""
    schema = run_file_schema()
    parts = [_RUN_FILE]
    for section, names in places().items():
        own = _own_schema(schema, section)
        heading = ", ".join(f"`{name}`" for name in names) or "The whole run file"
        parts.append(f"## {heading}\n")
        parts.append(f"{inspect.cleandoc(section.__doc__ or '')}\n")
        parts.append("| field | value | default | meaning |\n|---|---|---|---|")
        for field, described in own["properties"].items():
            default = "required" if field in own.get("required", []) else _default(described)
            cells = (f"`{field}`", _value(described), default, described["description"])
            parts.append(_row(cells))
        parts.append("")
    return "\n".join(parts)


def _default(field: dict[str, Any]) -> str:
    default = field.get("default")
    # What an unset field means stands in its description.
    if default is None or isinstance(default, dict):
        return ""
    return f"`{json.dumps(default)}`"


def _value(field: dict[str, Any]) -> str:
    """Describe which values a field takes, from its JSON Schema."""
    if "anyOf" in field:
        alternatives = [_value(each) for each in field["anyOf"] if each.get("type") != "null"]
        return " or ".join(alternatives)
    if "enum" in field or "const" in field:
        return ", ".join(f"`{value}`" for value in field.get("enum", [field.get("const")]))
    if "$ref" in field:
        return "a section"
    kind = field.get("type")
    if kind == "array":
        return f"list of: {_value(field['items'])}"
    if kind == "object":
        return "mapping"
    if kind == "string":
        return "path" if field.get("format") == "path" else "text"
    if kind == "boolean":
        return "`true`, `false`"
    return _number(field)


def _number(field: dict[str, Any]) -> str:
    words = ["whole number" if field["type"] == "integer" else "number"]
    bounds = {
        "exclusiveMinimum": "above",
        "minimum": "at least",
        "exclusiveMaximum": "below",
        "maximum": "at most",
    }
    limits = [f"{word} {field[name]:.10g}" for name, word in bounds.items() if name in field]
    words.append(", ".join(limits))
    return " ".join(words).strip()


def _row(cells: tuple[str, ...]) -> str:
    escaped = [cell.replace("|", "\\|") for cell in cells]
    return f"| {' | '.join(escaped)} |"


def commands_page() -> str:
    """Return the page with the arguments and options of each command."""
    parts = [_COMMANDS]
    for name, command in _commands(typer.main.get_command(app)):
        context = command.context_class(command, info_name=f"post-dist {name}")
        arguments = [_plain(each) for each in command.collect_usage_pieces(context)[1:]]
        parts.append(f"## {name}\n")
        parts.append(f"{command.help}\n")
        parts.append(f"```text\n{' '.join(['post-dist', name, *arguments])}\n```\n")
        parts.append("| option | meaning |\n|---|---|")
        for parameter in command.params:
            option, meaning = parameter.get_help_record(context)
            parts.append(_row((f"`{_plain(option)}`", meaning.replace("  [", " ["))))
        parts.append("")
    return "\n".join(parts)


def _plain(shown: str) -> str:
    """Return an option as typer shows it, with plain words for the types of values."""
    words = {
        "<int range>": "NUMBER",
        "<float range>": "NUMBER",
        "<int>": "NUMBER",
        "<str>": "TEXT",
        "......": "...",
        "[[": "[",
        "]]": "]",
    }
    # An argument's own name says what it is.
    if not shown.startswith("-"):
        shown = re.sub(r" <.*>$|[{}]", "", shown)
    for typed, plain in words.items():
        shown = shown.replace(typed, plain)
    return shown.replace("<path>", "PATH")


def _commands(group: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each command with its name, and those of a group such as `bench`."""
    for name, command in group.commands.items():
        full = f"{place} {name}".strip()
        if hasattr(command, "commands"):
            yield from _commands(command, full)
        else:
            yield full, command


def main() -> None:
    """Write the pages."""
    FOLDER.mkdir(exist_ok=True)
    for name, text in pages().items():
        (FOLDER / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
