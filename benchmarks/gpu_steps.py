"""Measure the steps of a stage for a page: times, memory and profiles."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from gpu_models import REPEATS
from gpu_page import Page
from gpu_profile import profile_step
from markdown_table import markdown_table
from regression import PEERS

from post_dist.bench.timing import time_steps


class PageMeasure:
    """Measures variants of a step, and adds what it finds to a page.

    Args:
        page: the page.
        title: title of the section.
    """

    def __init__(self, page: Page, title: str) -> None:
        self._page = page
        self._title = title

    def __call__(
        self,
        steps: Mapping[str, Callable[[], object]],
        amount: int,
        unit: str,
        device: torch.device,
    ) -> dict[str, Any]:
        """Time all steps, then profile the baseline and our own ones."""
        result = time_steps(steps, amount, unit, device, repeats=REPEATS)
        self._page.add(f"## {self._title}\n\n{step_table(result, unit)}")
        baseline = next(iter(steps))
        profiles = ""
        for name, step in steps.items():
            if name == baseline or not name.startswith(PEERS):
                profiles += profile_step(step, device).text(name)
        self._page.add(profiles)
        return result


def step_table(result: dict[str, Any], unit: str) -> str:
    """Return the result of `time_steps` as a table.

    Args:
        result: what `time_steps` returns.
        unit: unit of its amounts.
    """
    rows = []
    for row in result["rows"]:
        name = row["name"]
        low, high = row["interval"]
        rows.append(
            (
                name,
                f"{1000 * row['seconds_per_step']:.2f}",
                f"{1000 * low:.2f} to {1000 * high:.2f}",
                f"{result['ratios'][name]:.2f}",
                f"{row[f'{unit}_per_second']:,.0f}",
                f"{row['peak_memory_mib']:.0f}",
                f"{result['memory_ratios'][name]:.2f}",
            )
        )
    heads = ("step", "ms", "middle half", "ratio", f"{unit}/s", "peak MiB", "ratio")
    return markdown_table(heads, rows)
