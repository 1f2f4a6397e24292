"""Measure private heads with many plans, on public tasks alone.

    python benchmarks/head_plans.py measure
    python benchmarks/head_plans.py show

They say how far the rule by which `post-dist tune --minutes` plans a head is from the best plan.
Run `make demo` first: it fetches the model. The tasks come from PyPI and npm. Nobody's privacy is
at stake: the texts are public, and no run has a ledger.

Results go to head-plans-DEVICE.json. A measurement that is in the file is not repeated, so the
program may be stopped at any time. All of them take two hours on two cores.
"""

import itertools
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from arguments import measure_or_show
from experiments import HEAD, TWO_CORES, task_settings
from markdown_table import markdown_table
from results import Results
from tasks import fetch_public_tasks
from utility import BENCHMARKS, default_results, prepare_environment

if TYPE_CHECKING:
    from harness import Harness

    from post_dist.config.schema import RunConfig
    from post_dist.privacy.tuned_head import TunedHead

_RATED = ("negative", "neutral", "positive")
_TASKS = {
    "product reviews": ("rated_products", r"Review: {text}\nSentiment:", _RATED),
    "editorials": ("editorials", r"Editorial: {text}\nSentiment:", _RATED),
    "prose": ("prose", r"Text: {text}\nGenre:", ("editorial", "review", "lore", "romance")),
    "fiction": ("fiction", r"Text: {text}\nKind:", ("essay", "fiction")),
}
_SPLIT = ["private_task.validation_share=0.35", "private_task.test_share=0.05"]
"""Few examples are tuned on, so that many are left to tell plans apart."""

EXAMPLES = (500, 2000)
EPSILONS = (8, 1)
STEPS = (50, 100, 200, 400, 800)
SHARES = (0.05, 0.1, 0.25, 0.5)
"""Shares of the examples that a step draws."""
RATES = (0.25, 0.5, 2.0, 4.0)
"""Factors of the rate that follows from the plan, tried with the plan below."""
Plan = tuple[int, float]
"""Steps, and the share of the examples that a step draws."""
USUAL: Plan = (400, 0.1)


@dataclass(frozen=True)
class Cell:
    """A private run of a head.

    Attributes:
        examples: number of training examples.
        epsilon: target epsilon.
        steps: number of steps.
        share: share of the examples that a step draws.
        rate_factor: factor of the rate that follows from the plan.
    """

    examples: int
    epsilon: int
    steps: int
    share: float
    rate_factor: float = 1.0

    @property
    def name(self) -> str:
        """Its name in the results."""
        plan = f"{self.steps} x {self.share:g}, rate x {self.rate_factor:g}"
        return f"{self.examples} examples, epsilon {self.epsilon}, {plan}"

    @property
    def settings(self) -> list[str]:
        """What it changes in the run file."""
        return [
            f"privacy.declared_examples={self.examples}",
            f"privacy.steps={self.steps}",
            f"privacy.expected_batch_size={self.share * self.examples}",
        ]


def main() -> None:
    """Measure the tasks that have no result yet, or print the tables."""
    chosen = measure_or_show(__doc__).parse_args()
    prepare_environment()
    results = Results(chosen.results or default_results("head-plans"))
    if chosen.part == "show":
        print(tables(results.read()))
        return
    fetch_public_tasks(BENCHMARKS.parent / "demo")
    # Imported here, because DeepSpeed reads the environment that is set above.
    from harness import Harness

    harness = Harness(BENCHMARKS / "reviews.yaml", chosen.output)
    for name in _TASKS:
        if name not in results:
            results.add(name, measure(harness, name))


def cells() -> Iterator[Cell]:
    """Return all runs of a task."""
    for examples, epsilon in itertools.product(EXAMPLES, EPSILONS):
        for steps, share in itertools.product(STEPS, SHARES):
            yield Cell(examples, epsilon, steps, share)
        for factor in RATES:
            yield Cell(examples, epsilon, *USUAL, factor)


def measure(harness: "Harness", name: str) -> dict[str, Any]:
    """Train a head with all plans on a task, behind one public prompt.

    Args:
        harness: makes the student and the public prompt.
        name: name of the task.

    Returns:
        The share of right validation examples of each run.
    """
    file, template, words = _TASKS[name]
    path = f"path: ../demo/{file}.csv"
    texts = f"name: {name}, {path}"
    # The public prompt is made of the texts alone, without their labels.
    task = task_settings(texts, texts, template, words)
    settings = [*TWO_CORES, "seed=0", *HEAD, "warm_start={}", *task, *_SPLIT]
    start = time.monotonic()
    head, others = harness.head(settings)
    rows = {}
    for cell in cells():
        config = harness.private_config([*settings, *cell.settings], cell.epsilon)
        rows[cell.name] = round(_right(head, config, cell) / others, 4)
        print(name, cell.name, rows[cell.name], flush=True)
    return {
        "device": harness.device,
        "seconds": round(time.monotonic() - start),
        "before tuning": round(head.count_right(head.parameters()) / others, 4),
        "rows": rows,
    }


def _right(head: "TunedHead", config: "RunConfig", cell: Cell) -> int:
    """Train a head, and return how many validation examples it gets right."""
    from post_dist.privacy.calibration import private_plan
    from post_dist.privacy.mechanism import PrivateOptimizer
    from post_dist.privacy.private_run import learning_rate
    from post_dist.privacy.randomness import RandomSource
    from post_dist.runtime.optimizers import result_of

    plan = private_plan(config)
    source = RandomSource(cell.name, bytes(32))
    members = np.random.default_rng(0).permutation(len(head.units))[: cell.examples]
    parameters = head.parameters()
    for parameter in parameters:
        parameter.requires_grad_(True)
    rate = cell.rate_factor * learning_rate(config, plan)
    optimizer = head.optimizer(parameters, rate, plan.steps)
    private = PrivateOptimizer(optimizer, plan, source)
    for step in range(plan.steps):
        drawn = plan.sampler.draw(source, len(members), 0, step)
        for gradients in head.gradients(parameters, members[drawn].tolist()):
            private.accumulate(gradients)
        private.finish(step, lambda commitment: None)
    return head.count_right(result_of(parameters, optimizer))


def tables(results: dict[str, Any]) -> str:
    """Return three tables: by plan, by rate, and what the choice of a plan costs on each task."""
    parts = [_by_plan(results), _by_rate(results)]
    # A plan is chosen on the other tasks.
    if len(results) > 1:
        parts.append(_by_task(results))
    return "\n\n".join(parts)


def _by_plan(results: dict[str, Any]) -> str:
    heads = ["steps", *[f"{100 * share:g}% of the examples in a step" for share in SHARES]]
    lines = []
    for steps in STEPS:
        accuracies = [_at_both_epsilons(results, steps, share, 1.0) for share in SHARES]
        lines.append((str(steps), *accuracies))
    return markdown_table(heads, lines)


def _by_rate(results: dict[str, Any]) -> str:
    factors = sorted((*RATES, 1.0))
    heads = ["rate, times that of the plan", *[f"{factor:g}" for factor in factors]]
    accuracies = [_at_both_epsilons(results, *USUAL, factor) for factor in factors]
    return markdown_table(heads, [("accuracy", *accuracies)])


def _by_task(results: dict[str, Any]) -> str:
    heads = ["task", "examples", "epsilon", "before tuning", f"{USUAL[0]} x {100 * USUAL[1]:g}%"]
    heads += ["best plan of the other tasks", "best plan of this task"]
    lines = []
    for task, examples, epsilon in itertools.product(results, EXAMPLES, EPSILONS):
        others = [name for name in results if name != task]
        learned = max(_plans(), key=lambda plan: _mean(results, others, examples, epsilon, plan))
        accuracies = {plan: _mean(results, [task], examples, epsilon, plan) for plan in _plans()}
        best = max(accuracies, key=lambda plan: accuracies[plan])
        shown = [results[task]["before tuning"], accuracies[USUAL]]
        cells_of_line = [f"{100 * value:.1f}" for value in shown]
        cells_of_line += [_with_plan(accuracies, plan) for plan in (learned, best)]
        lines.append((task, f"{examples:,}", str(epsilon), *cells_of_line))
    return markdown_table(heads, lines)


def _with_plan(accuracies: dict[Plan, float], plan: Plan) -> str:
    steps, share = plan
    return f"{100 * accuracies[plan]:.1f} ({steps} x {100 * share:g}%)"


def _plans() -> list[Plan]:
    return list(itertools.product(STEPS, SHARES))


def _mean(
    results: dict[str, Any], tasks: Sequence[str], examples: int, epsilon: int, plan: Plan
) -> float:
    """Return the mean accuracy of a plan over tasks."""
    name = Cell(examples, epsilon, *plan).name
    return statistics.mean(results[task]["rows"][name] for task in tasks)


def _at_both_epsilons(results: dict[str, Any], steps: int, share: float, rate_factor: float) -> str:
    """Return the mean accuracies over tasks and numbers of examples, in percent."""
    means = []
    for epsilon in EPSILONS:
        names = [Cell(count, epsilon, steps, share, rate_factor).name for count in EXAMPLES]
        found = [task["rows"][name] for task in results.values() for name in names]
        means.append(f"{100 * statistics.mean(found):.1f}")
    return ", ".join(means)


if __name__ == "__main__":
    main()
