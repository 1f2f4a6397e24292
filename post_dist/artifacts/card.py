"""Write the model card of an artifact: a README.md for people and for the Hugging Face hub."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_SOURCE = (
    "Made by [post_dist](https://arxiv.org/abs/2506.16196); hashes and lineage are in "
    "`post_dist.json`."
)
_MARKDOWN = re.compile(r"[\\`*_|~\[\]#]")
"""Characters with a meaning in Markdown."""


def write_card(  # noqa: PLR0913 - one parameter for each part of a card
    folder: Path,
    title: str,
    summary: str,
    settings: Mapping[str, Any],
    *,
    library: str,
    tag: str = "",
    notes: Mapping[str, Sequence[str]] = {},
    base_model: str | None = None,
) -> None:
    """Write `README.md` into an artifact folder: metadata that the hub reads, and the text.

    Args:
        folder: the artifact's folder.
        title: the heading.
        summary: one or two sentences on what the artifact is.
        settings: rows of the table, by name. An inner mapping gives a row for each of its entries.
        library: the hub's name of the library that loads the artifact, such as `peft`.
        tag: one more tag for the hub.
        notes: lists of notes, by their heading.
        base_model: hub name of the model that the artifact belongs to, for the hub's links.
    """
    from huggingface_hub import ModelCard, ModelCardData  # takes half a second to import

    # The library writes the metadata, so no name can break its YAML.
    tags = ["post_dist"]
    if tag:
        tags.append(tag)
    metadata = ModelCardData(library_name=library, tags=tags, base_model=base_model)
    text = _text(title, summary, settings, notes)
    ModelCard(f"---\n{metadata.to_yaml()}\n---\n{text}").save(folder / "README.md")


def _text(
    title: str, summary: str, settings: Mapping[str, Any], notes: Mapping[str, Sequence[str]]
) -> str:
    table = ["| setting | value |", "|---|---|"]
    for name, value in _flat(settings).items():
        # A value may be a word of another party, such as the template of a prompt.
        table.append(f"| {name} | {markdown_text(str(value))} |")
    parts = [f"# {plain(title)}", summary, "\n".join(table)]
    for heading, entries in notes.items():
        parts.append(f"## {heading}")
        parts.append("\n".join(f"- {entry}" for entry in entries))
    parts.append(_SOURCE)
    return "\n\n".join(parts) + "\n"


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings without inner mappings: `a: {b: 1}` becomes `a, b: 1`."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if not isinstance(value, Mapping):
            flat[name] = value
            continue
        for inner, entry in value.items():
            flat[f"{name}, {inner}"] = entry
    return flat


def plain(text: str) -> str:
    """Replace characters that do not print, such as line breaks and terminal escapes, by spaces."""
    kept = [character if character.isprintable() else " " for character in text]
    return "".join(kept)


def markdown_text(text: str) -> str:
    """Return a text that Markdown shows as it is, on one line."""
    escaped = _MARKDOWN.sub(r"\\\g<0>", plain(text))
    # HTML inside Markdown would be run by some viewers.
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
