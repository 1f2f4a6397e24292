"""Measure other private ways to label texts, on the three tasks of `utility.py`.

    python benchmarks/rivals.py measure --seeds 0 1 2
    python benchmarks/rivals.py show

The rivals:

    shots       few labeled private texts in front of each text, without privacy
    votes       public texts in front, which private groups have labeled by votes (PromptPATE)
    synthetic   a head on the LLM, trained on synthetic texts that private ones vote on (Aug-PE)
    synthetic shots   the synthetic texts with most votes in front of each text

Run `make demo` first, which fetches the model and the reviews. Results go to rivals-DEVICE.json.
A measurement that is in the file is not repeated, so the program may be stopped at any time.
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

from arguments import measure_or_show
from experiments import HEAD, TASKS
from results import Results
from rival_tables import rivals_table
from tasks import fetch_tasks
from utility import BENCHMARKS, default_results, prepare_environment

EPSILONS = (8, 1)
SETTINGS = {
    "reviews": HEAD,
    "tweets": [*HEAD, "warm_start={}", *TASKS["tweets"]],
    "genres": [*HEAD, "warm_start={}", *TASKS["genres"]],
}
"""The settings of our own rows."""
OPENINGS = {
    "reviews": 'A sentence from a {word} film review: "',
    "tweets": 'A {word} tweet: "',
    "genres": 'A sentence from a text about {word}: "',
}
"""What the LLM reads before it writes a synthetic text."""
PRIVATELY = {
    "votes": (None, *EPSILONS),
    "synthetic": EPSILONS,
    "synthetic shots": EPSILONS,
}
"""The values of epsilon that each rival is measured at; None is without noise."""
RIVALS = ("shots", *PRIVATELY)


@dataclass(frozen=True)
class Measurement:
    """One measurement: a rival on a task.

    Attributes:
        rival: one of `RIVALS`.
        task: one of the keys of `SETTINGS`.
        epsilon: target epsilon; None without privacy.
        seed: draws everything.
    """

    rival: str
    task: str
    epsilon: float | None
    seed: int

    @property
    def key(self) -> str:
        """Its key in the file of results."""
        privacy = "no privacy" if self.epsilon is None else f"epsilon {self.epsilon:g}"
        return f"{self.rival}, {self.task}, {privacy}, seed {self.seed}"


def main() -> None:
    """Measure what has no result yet, or print the table."""
    chosen = parse_arguments()
    prepare_environment()
    results = Results(chosen.results or default_results("rivals"))
    if chosen.part == "show":
        ours = Results(chosen.ours or default_results())
        print(rivals_table(results.read(), ours.read()))
        return

    fetch_tasks(BENCHMARKS.parent / "demo")
    for seed in chosen.seeds:
        for task in chosen.tasks:
            for rival in chosen.rivals:
                measure(rival, task, seed, chosen, results)


def measure(rival: str, task: str, seed: int, chosen: argparse.Namespace, results: Results) -> None:
    """Measure a rival on a task at every epsilon, and write each result as soon as it is there."""
    epsilons = PRIVATELY.get(rival, (None,))
    wanted = [Measurement(rival, task, epsilon, seed) for epsilon in epsilons]
    missing = [each for each in wanted if each.key not in results]
    if not missing:
        return
    # Imported here, because DeepSpeed reads the environment that is set above.
    from rival_runs import RivalRuns

    runs = RivalRuns(SETTINGS[task], OPENINGS[task], seed, chosen.output)
    for each in missing:
        start = time.monotonic()
        row = runs.row(rival, each.epsilon, chosen.split)
        seconds = round(time.monotonic() - start)
        print(f"{each.key}: {row}, {seconds} s", flush=True)
        results.add(each.key, {"device": runs.device, "seconds": seconds, "row": row})


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = measure_or_show(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--tasks", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--rivals", nargs="+", choices=RIVALS, default=list(RIVALS))
    parser.add_argument("--split", choices=["test", "validation"], default="test")
    parser.add_argument("--ours", type=Path, help="results of utility.py; default: by this device")
    return parser.parse_args()


if __name__ == "__main__":
    main()
