"""The model card of a student."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from post_dist.artifacts.card import write_card


def write_student_card(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write the card of a student into its folder.

    Args:
        folder: the folder of the student.
        settings: what its manifest says of it.
    """
    layers = settings["layers"]
    counts = settings["given_away"]
    copied = 100 * counts["student_parameters"] / counts["teacher_parameters"]
    unchanged = 100 * counts["unchanged_parameters"] / counts["teacher_parameters"]
    summary = (
        f"A student of {len(layers)} of {settings['num_teacher_layers']} layers "
        f"(numbers {layers}), distilled on public text. It was copied from {copied:.1f}% of the "
        f"teacher's parameters, and {unchanged:.1f}% are still equal to the teacher's."
    )
    write_card(
        folder,
        "Student for private soft-prompt tuning",
        summary,
        settings["held_out"] | counts | {"perplexity": settings["perplexity"]},
        library="transformers",
    )
