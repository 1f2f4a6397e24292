"""The file of results of `utility.py`, and the tables made of it."""

import fcntl
import json
import os
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from experiments import UPPER_BOUND, WITH_MORE
from markdown_table import markdown_table

Row = dict[str, Any]
"""One line of an evaluation table, as `post-dist evaluate --json` prints it."""


class Results:
    """Measurements by name and seed, in a JSON file that several processes may add to.

    Args:
        path: the file. It need not exist.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> dict[str, Any]:
        """Return all measurements by the name that `key` makes."""
        if not self._path.exists():
            return {}
        results: dict[str, Any] = json.loads(self._path.read_text())
        return results

    def __contains__(self, key: str) -> bool:
        return key in self.read()

    def add(self, key: str, measured: dict[str, Any]) -> None:
        """Add a measurement and write the file anew."""
        with self._locked():
            partial = self._path.with_suffix(".partial")
            partial.write_text(json.dumps(self.read() | {key: measured}, indent=1) + "\n")
            partial.rename(self._path)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Keep other processes from adding in the meantime."""
        folder = os.open(self._path.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            yield
        finally:
            os.close(folder)


def key(name: str, seed: int) -> str:
    """Return the key of an experiment's measurement with a seed."""
    return f"{name}, seed {seed}"


def tables(results: dict[str, Any]) -> str:
    """Return a Markdown table for each experiment.

    A row has the accuracy in percent, its mean and extremes over seeds; the AUC in percent; and the
    part of the gap that it closes. The gap is from zero-shot to full prompt tuning of the target
    without privacy, on the test split.
    """
    # Seeds of an experiment are summarized in one table.
    rows_by_experiment = _rows_by_experiment(results)
    text = ""
    for name, rows in rows_by_experiment.items():
        upper_bound = UPPER_BOUND + WITH_MORE if name.endswith(WITH_MORE) else UPPER_BOUND
        best = rows_by_experiment.get(upper_bound, {}).get("full prompt tuning")
        # Other experiments are on the validation split, which has no upper bound.
        on_test_split = name.startswith(("table", UPPER_BOUND))
        # One line for each row of the evaluation, over its seeds.
        table = []
        for row_name, seeds in rows.items():
            accuracies = [100 * each["accuracy_micro"] for each in seeds]
            closed = _gap_closed(rows, row_name, best) if on_test_split else ""
            table.append(
                (
                    row_name,
                    f"{statistics.mean(accuracies):.1f}",
                    f"{min(accuracies):.1f}, {max(accuracies):.1f}",
                    f"{statistics.mean(100 * each['auc'] for each in seeds):.1f}",
                    closed,
                    len(seeds),
                )
            )
        heads = ("row", "accuracy", "least, most", "AUC", "gap closed", "seeds")
        text += f"\n### {name}\n\n{markdown_table(heads, table)}"
    return text


def _rows_by_experiment(results: dict[str, Any]) -> dict[str, dict[str, list[Row]]]:
    """Return each experiment's rows by their name, one for each seed."""
    found: dict[str, dict[str, list[Row]]] = {}
    for measurement, measured in results.items():
        experiment = measurement.rpartition(", seed ")[0]
        rows = found.setdefault(experiment, {})
        for row in measured["rows"]:
            rows.setdefault(row["name"], []).append(row)
    return found


def _gap_closed(rows: dict[str, list[Row]], name: str, best: list[Row] | None) -> str:
    """Return the part of the gap from zero-shot to `best` that a row closes, of the means."""
    if best is None or "zero-shot" not in rows:
        return ""
    lowest = _mean_accuracy(rows["zero-shot"])
    gap = _mean_accuracy(best) - lowest
    return f"{(_mean_accuracy(rows[name]) - lowest) / gap:.0%}"


def _mean_accuracy(seeds: list[Row]) -> float:
    return statistics.mean(100 * each["accuracy_micro"] for each in seeds)
