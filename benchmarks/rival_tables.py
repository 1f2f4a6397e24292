"""The table of `rivals.py`: rivals and our own rows beside each other."""

import statistics
from typing import Any

from markdown_table import markdown_table

TASKS = ("reviews", "tweets", "genres")
OURS = {
    "reviews": "head, head on the LLM",
    "tweets": "head, tweets, head on the LLM",
    "genres": "head, genres, head on the LLM",
}
"""Our experiment on each task, in the results of `utility.py`."""
OWNER_ALONE = {
    "ours: a head on the student, the owner alone": "head",
    "DP-LoRA on the student, the owner alone": "LoRA",
}
"""Lines of an owner without a provider, and the adapter of each in the results."""
OUR_ROWS = {
    "the LLM alone (zero-shot)": "zero-shot",
    "TF-IDF + logistic regression": "TF-IDF + logistic regression",
    "ours: a head on the student": "student + prompt",
    "ours: a head on the LLM": "transferred",
    "DP logistic regression, epsilon 8": "DP logistic regression, epsilon 8",
    "ours: a head on the student, epsilon 8": "student + prompt, epsilon 8",
    "ours: a head on the LLM, epsilon 8": "transferred, epsilon 8",
    "DP logistic regression, epsilon 1": "DP logistic regression, epsilon 1",
    "ours: a head on the student, epsilon 1": "student + prompt, epsilon 1",
    "ours: a head on the LLM, epsilon 1": "transferred, epsilon 1",
}
"""Lines of our rows, and their names in the results."""
RIVAL_NAMES = {
    "shots": "true labels in context",
    "votes": "PromptPATE: voted labels in context",
    "synthetic": "Aug-PE: a head on the LLM, from synthetic texts",
    "synthetic shots": "Aug-PE: synthetic texts in context",
}
_PRIVACY = ("no privacy", "epsilon 8", "epsilon 1")


def rivals_table(rivals: dict[str, Any], ours: dict[str, Any]) -> str:
    """Return a Markdown table: accuracy, macro accuracy and AUC in percent, means over seeds.

    Args:
        rivals: results of `rivals.py`.
        ours: results of `utility.py`.
    """
    lines: dict[str, list[list[dict[str, Any]]]] = {}
    for privacy in _PRIVACY:
        for rival, name in RIVAL_NAMES.items():
            found = [_rows_of_rival(rivals, f"{rival}, {task}, {privacy}") for task in TASKS]
            lines[f"{name}, {privacy}"] = found
        for line, adapter in OWNER_ALONE.items():
            names = [f"{adapter}, the owner alone, {task}, {privacy}" for task in TASKS]
            found = [_rows_of_ours(ours, name, "student + prompt") for name in names]
            lines[f"{line}, {privacy}"] = found
        for line, row in OUR_ROWS.items():
            if _privacy_of(line) == privacy:
                found = [_rows_of_ours(ours, OURS[task], row) for task in TASKS]
                lines[line if ", epsilon" in line else f"{line}, no privacy"] = found
    table = []
    for line, by_task in lines.items():
        if any(by_task):
            cells = [_cell(rows) for rows in by_task]
            table.append((line, *cells, ", ".join(str(len(rows)) for rows in by_task)))
    return markdown_table(("row", *TASKS, "seeds"), table)


def _privacy_of(line: str) -> str:
    found = line.rpartition(", ")[2]
    return found if found in _PRIVACY else _PRIVACY[0]


def _rows_of_rival(results: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return [each["row"] for key, each in results.items() if key.rpartition(", seed ")[0] == name]


def _rows_of_ours(results: dict[str, Any], experiment: str, name: str) -> list[dict[str, Any]]:
    found = []
    for key, measured in results.items():
        if key.rpartition(", seed ")[0] == experiment:
            found += [row for row in measured["rows"] if row["name"] == name]
    return found


def _cell(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return ""
    names = ("accuracy_micro", "accuracy_macro", "auc")
    means = [statistics.mean(100 * row[name] for row in rows) for name in names]
    return ", ".join(f"{mean:.1f}" for mean in means)
