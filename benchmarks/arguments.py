"""The command line of the benchmarks that measure, keep what they have, and show it as a table."""

import argparse
from pathlib import Path

_RUNS = Path(__file__).resolve().parents[1] / "runs"


def measure_or_show(description: str | None) -> argparse.ArgumentParser:
    """Return a parser of `measure` and `show`, and of the places of runs and results.

    Args:
        description: the docstring of the program.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=["measure", "show"])
    parser.add_argument("--output", type=Path, default=_RUNS, help="folder of the runs")
    parser.add_argument("--results", type=Path, help="file of results; default: by this device")
    return parser
