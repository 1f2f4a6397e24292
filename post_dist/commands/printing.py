"""How a command that answers with figures or a table prints them."""

import json
import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

_TABLE_WIDTH = 130


def print_numbers(figures: dict[str, Any], as_json: bool) -> None:
    """One JSON object, or a line for each figure."""
    if as_json:
        print(
            json.dumps(
                {name: None if value == math.inf else value for name, value in figures.items()}
            )
        )
        return
    for name, value in figures.items():
        if isinstance(value, list):
            print(f"{name}:", *(f"  {entry}" for entry in value), sep="\n")
        else:
            print(f"{name}: {value:.6g}" if isinstance(value, float) else f"{name}: {value}")


def print_wide(table: "Table") -> None:
    """Show a table whole, however narrow the terminal is."""
    from rich.console import Console

    console = Console()
    console.width = max(console.width, _TABLE_WIDTH)
    console.print(table)
