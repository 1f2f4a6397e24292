"""What a table says in a few sentences: the effect of the prompt, and its privacy."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from post_dist.artifacts.evaluation_table import DP_REGRESSION, MAJORITY, TF_IDF
from post_dist.report.charts import Reference, percent
from post_dist.report.lineage import ReportedArtifact, number
from post_dist.report.tables import (
    cautions,
    has_classes,
    measured_field,
    table_title,
)

ROW_NOTES = {
    "zero-shot": "large LLM, no prompt",
    MAJORITY: "no model: the most frequent class",
    TF_IDF: "no language model, fitted without privacy",
    DP_REGRESSION: "no language model, the epsilon of the prompt",
    "student": "student, no prompt",
    "student + prompt": "student, the owner's prompt",
    "direct transfer": "large LLM, the owner's prompt unchanged",
    "published transfer": "large LLM, the paper's loss",
    "transferred": "large LLM, the transferred prompt",
    "proxy-tuning": "large LLM and student together",
    "ensemble": "large LLM and student together",
    "full prompt tuning": "large LLM, which saw the private data",
}
"""What each row of the table is."""

_PROMPTED = (("zero-shot", "transferred"), ("student", "student + prompt"))
"""Pairs of rows of one model, without a prompt and with it. The first pair in a table counts."""

_MODELS = {"transferred": "the large LLM", "student + prompt": "the student"}


@dataclass(frozen=True)
class Fact:
    """One number at the top of the page."""

    value: str
    label: str


@dataclass(frozen=True)
class Verdict:
    """What the page says first.

    Attributes:
        headline: the effect of the prompt, in one sentence.
        sentences: what to know about this effect.
        privacy: epsilon and delta of the prompt, in one or two sentences.
        facts: the main numbers.
        row: name of the row with the prompt.
    """

    headline: str
    sentences: Sequence[str]
    privacy: str
    facts: Sequence[Fact]
    row: str


def verdict_of(table: Mapping[str, Any], made: Sequence[ReportedArtifact]) -> Verdict:
    """Compare the prompt with the model that has none.

    Args:
        table: the table of the evaluation.
        made: the artifacts that the table rests on.
    """
    field = measured_field(table)
    rows = {row["name"]: row for row in table["rows"]}
    pair = next((pair for pair in _PROMPTED if set(pair) <= rows.keys()), None)
    if pair is None:
        last = table["rows"][-1]
        facts = [_measured(last, field), *_readings(table)]
        return Verdict(table_title(table), [], _privacy(last, made), facts, last["name"])

    without, prompted = (rows[name] for name in pair)
    before, after = percent(without[field]), percent(prompted[field])
    effect = f"takes {_MODELS[pair[1]]} from {before} to {after}"
    if before == after:
        effect = f"leaves {_MODELS[pair[1]]} at {after}"
    # A headline is read alone. One class for all texts must not be as good without being named.
    guessed = rows[MAJORITY][field] if MAJORITY in rows else -math.inf
    if guessed >= prompted[field] or percent(guessed) == after:
        effect += f", and the majority class reaches {percent(guessed)}"
    kind = "transferred prompt" if pair[1] == "transferred" else "prompt"
    points = 100 * (prompted[field] - without[field])
    facts = [
        _measured(prompted, field),
        Fact(f"{points:+.1f}", f"points over {pair[0]}"),
        Fact(_short_epsilon(prompted), "ε of this prompt"),
        *_readings(table),
    ]
    return Verdict(
        headline=f"The {kind} {effect}",
        sentences=_sentences(table, without, prompted, rows),
        privacy=_privacy(prompted, made),
        facts=facts,
        row=pair[1],
    )


def references(table: Mapping[str, Any], settings: Mapping[str, Any]) -> list[Reference]:
    """Return the values to compare with: guessing, and the large LLM without a prompt.

    Args:
        table: the table of the evaluation.
        settings: the settings of the evaluation.
    """
    found = []
    task = settings.get("private_task")
    labels = task.get("labels") if isinstance(task, dict) else None
    if has_classes(table) and labels:
        found.append(Reference(f"guessing, 1 of {len(labels)}", 1 / len(labels)))
    for row in table["rows"]:
        if row["name"] == "zero-shot":
            found.append(Reference("large LLM without a prompt", row[measured_field(table)]))
    return found


def row_notes(table: Mapping[str, Any]) -> dict[str, str]:
    """Return a few words on each row of a table, by its name."""
    notes = {}
    for row in table["rows"]:
        # The name of a row may go on with an epsilon, or with `without biases`.
        kind = row["name"].partition(", ")[0]
        notes[row["name"]] = ROW_NOTES.get(kind, "")
    return notes


def _sentences(
    table: Mapping[str, Any],
    without: Mapping[str, Any],
    prompted: Mapping[str, Any],
    rows: Mapping[str, Mapping[str, Any]],
) -> list[str]:
    """Say on how many examples the prompt was measured, and whether the difference is clear.

    Args:
        table: the table of the evaluation.
        without: the row of the model without a prompt.
        prompted: the row of the same model with it.
        rows: all rows, by their name.
    """
    metric = "Accuracy" if has_classes(table) else "Exact match"
    sentences = [f"{metric} on {prompted['n']} examples of {table_title(table)}."]
    before, after = sorted([without["interval_95"], prompted["interval_95"]])
    if before[1] < after[0]:
        sentences.append("The two 95% intervals do not overlap.")
    else:
        sentences.append("The two 95% intervals overlap, so the difference may be chance.")
    sentences += cautions(table)
    student = rows.get("student + prompt")
    if student is not None and student is not prompted:
        reached = percent(student[measured_field(table)])
        sentences.append(f"The owner's own prompt reaches {reached} on the student.")
    return sentences


def _privacy(row: Mapping[str, Any], made: Sequence[ReportedArtifact]) -> str:
    """Say which privacy guarantee a row's prompt has."""
    statement = next((each.privacy for each in made if each.role == row["name"]), {})
    if statement.get("private") is False:
        return "Not private: the noise came from a seed and can be subtracted."
    if row["epsilon"] is None:
        return (
            "Tuned without differential privacy: the prompt may reveal its training data."
            if row["name"] in _MODELS
            else "No differential privacy is claimed."
        )
    epsilon = number(row["epsilon"])
    if "delta" not in statement:
        return f"Differentially private with ε = {epsilon}. δ is in the prompt's privacy.json."
    return (
        f"Differentially private with ε = {epsilon} and δ = {statement['delta']:.1e}, for "
        f"{statement.get('unit')}."
    )


def _short_epsilon(row: Mapping[str, Any]) -> str:
    epsilon = row["epsilon"]
    return "none" if epsilon is None or math.isinf(epsilon) else number(epsilon)


def _measured(row: Mapping[str, Any], field: str) -> Fact:
    low, high = map(percent, row["interval_95"])
    return Fact(percent(row[field]), f"{row['name']}, {low} to {high}")


def _readings(table: Mapping[str, Any]) -> list[Fact]:
    """Return how often the test split was read; nothing for another split."""
    readings = table.get("test_readings")
    return [] if readings is None else [Fact(f"{readings}×", "test split read")]
