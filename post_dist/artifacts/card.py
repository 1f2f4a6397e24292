"""The model card of an artifact: a README.md that says what it is, for a person."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

_TEMPLATE = """---
library_name: {library}
tags: [post_dist{tag}]
---
# {title}

{summary}

| setting | value |
|---|---|
{rows}
{notes}
Made by [post_dist](https://arxiv.org/abs/2506.16196); hashes and lineage are in `post_dist.json`.
"""


def write_card(
    folder: Path,
    title: str,
    summary: str,
    settings: dict[str, Any],
    *,
    library: str,
    tag: str = "",
    notes: Mapping[str, list[str]] = {},
) -> None:
    """Write `README.md` into an artifact folder; each of the notes is a heading with a list under it."""
    rows = "\n".join(f"| {name} | {value} |" for name, value in _flat(settings).items())
    lists = "".join(
        f"\n## {heading}\n\n" + "".join(f"- {entry}\n" for entry in entries)
        for heading, entries in notes.items()
    )
    tagged = f", {tag}" if tag else ""
    (folder / "README.md").write_text(
        _TEMPLATE.format(
            library=library, tag=tagged, title=title, summary=summary, rows=rows, notes=lists
        )
    )


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without inner mappings: `a: {b: 1}` becomes `a, b: 1`."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= (
            {f"{name}, {inner}": entry for inner, entry in value.items()}
            if isinstance(value, Mapping)
            else {name: value}
        )
    return flat
