"""The model card of an artefact: a README.md that says what it is, for a person."""

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

Made by [post_dist](https://arxiv.org/abs/2506.16196); hashes and lineage are in `post_dist.json`.
"""


def write_card(folder: Path, title: str, summary: str, settings: dict[str, Any], *, library: str, tag: str = "") -> None:
    """Write `README.md` into an artefact folder."""
    rows = "\n".join(f"| {name} | {value} |" for name, value in settings.items())
    tagged = f", {tag}" if tag else ""
    (folder / "README.md").write_text(_TEMPLATE.format(library=library, tag=tagged, title=title, summary=summary, rows=rows))
