"""Measure what students give away of their teacher, and what attacks on them reach.

    python benchmarks/given_away.py measure
    python benchmarks/given_away.py show

Run `make demo` first, which fetches the model and the reviews. Results go to
given-away-DEVICE.json. A measurement that is in the file is not repeated, so the program may be
stopped at any time. An attack with a million tokens takes half an hour on two cores.
"""

import time
from typing import Any

from arguments import measure_or_show
from experiments import SMALLER_STUDENTS, TWO_CORES
from markdown_table import markdown_table
from results import Results
from utility import BENCHMARKS, default_results, prepare_environment

STUDENTS = {
    "18 of 30 layers, 15 of them frozen": ["corpus.max_tokens=3000000"],
    **SMALLER_STUDENTS,
}
ATTACK_TOKENS = (100_000, 1_000_000)


def main() -> None:
    """Measure the students that have no result yet, or print the table."""
    chosen = measure_or_show(__doc__).parse_args()
    prepare_environment()
    results = Results(chosen.results or default_results("given-away"))
    if chosen.part == "show":
        print(table(results.read()))
        return
    # Imported here, because DeepSpeed reads the environment that is set above.
    from harness import Harness

    harness = Harness(BENCHMARKS / "reviews.yaml", chosen.output)
    for name, changes in STUDENTS.items():
        if name in results:
            continue
        attacks = f"distill.attack_tokens={list(ATTACK_TOKENS)}"
        settings = [*TWO_CORES, "seed=0", *changes, attacks]
        start = time.monotonic()
        row = harness.given_away(settings)
        seconds = round(time.monotonic() - start)
        results.add(name, {"device": harness.device, "seconds": seconds, "row": row})


def table(results: dict[str, Any]) -> str:
    """Return a Markdown table with a line for each student."""
    lines = []
    for name, measured in results.items():
        row = measured["row"]
        shares = [
            f"{100 * row[count] / row['teacher_parameters']:.0f}"
            for count in ("student_parameters", "unchanged_parameters")
        ]
        perplexities = [f"{value:.1f}" for value in row["perplexity"].values()]
        accuracies = [
            f"{100 * row['zero-shot'][model]['accuracy_micro']:.1f}"
            for model in ("teacher", "student")
        ]
        lines.append((name, *shares, *perplexities, *accuracies))
    attacked = [f"after {tokens:,} more tokens" for tokens in ATTACK_TOKENS]
    heads = ["student", "parameters of the teacher, %", "unchanged, %"]
    heads += ["perplexity of the teacher", "of the student", *attacked]
    heads += ["zero-shot accuracy of the teacher, %", "of the student, %"]
    return markdown_table(heads, lines)


if __name__ == "__main__":
    main()
