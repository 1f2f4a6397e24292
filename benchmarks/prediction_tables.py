"""The plan's time and memory beside those that `prediction.py` measured."""

import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import shapes
from markdown_table import markdown_table
from prediction_settings import FIT, HELD_OUT, Setting
from scipy.optimize import nnls

from post_dist.artifacts.task import PromptTask
from post_dist.bench.scale import MEASURED_STEPS
from post_dist.bench.transfer import MAX_EXAMPLES
from post_dist.config.schema import RunConfig
from post_dist.data.order import rank_batches, rows_of_like_length
from post_dist.data.public_text import load_public_texts
from post_dist.data.task_reader import TaskReader
from post_dist.models.load import load_tokenizer
from post_dist.models.size import ModelSize, size_of
from post_dist.planning.hardware import Hardware, Machine
from post_dist.planning.plan import plan_run
from post_dist.planning.scaling import grown

Measured = dict[str, Any]
"""What `bench scale` printed, with the setting's values by their names."""


@dataclass(frozen=True)
class Rates:
    """What limits a machine.

    Attributes:
        compute: operations per second.
        link: bytes per second between ranks.
        latency: seconds of each collective beside its bytes.
        memory: bytes per second of a rank's memory.
    """

    compute: float = 1e30
    link: float = 1e30
    latency: float = 0.0
    memory: float = 1e30

    def hardware(self) -> Hardware:
        """Return the machine as a hardware file describes it."""
        link = {"gb_per_second": self.link / 1e9, "latency_us": self.latency * 1e6}
        share = dict.fromkeys(("compute", "memory", "node", "network", "host"), 1.0)
        return Hardware.model_validate(
            {
                "memory_gib": 1e9,
                "teraflops": {"fp32": self.compute / 1e12},
                "memory_gb_per_second": self.memory / 1e9,
                "node": link | {"gpus": 8},
                "network": link,
                "host": {"memory_gib": 1e9, "gb_per_second": 1e30},
                "share": share,
                "overlap": False,
            }
        )


# On a machine where everything but one unit is free, and that unit costs 1, the seconds that the
# plan gives are the number of units that a step takes.
_ONE_UNIT = {
    "compute": Rates(compute=1.0),
    "link": Rates(link=1.0),
    "latency": Rates(latency=1.0),
    "memory": Rates(memory=1.0),
}
_UNITS = {"compute": "flop/s", "link": "B/s", "latency": "s", "memory": "B/s"}


@dataclass
class Comparison:
    """One measured step and its plan.

    Attributes:
        setting: model, batch and engine.
        stage: distill or transfer.
        scaling: strong or weak.
        ranks: number of ranks.
        batch_size: examples of the step, over all ranks.
        measured_seconds: median time of the step.
        measured_gib: peak memory of the rank that held most.
        units: what the planned step takes of each unit, in the order of `_UNITS`.
        planned_gib: the plan's memory.
        planned_seconds: the plan's time, once the machine's rates are fitted.
    """

    setting: Setting
    stage: str
    scaling: str
    ranks: int
    batch_size: int
    measured_seconds: float
    measured_gib: float
    units: list[float]
    planned_gib: float
    planned_seconds: float = 0.0


def compare(measurements: list[Measured]) -> list[Comparison]:
    """Plan every step that was measured.

    Args:
        measurements: what `prediction.py` has printed.
    """
    comparisons = []
    for measured in measurements:
        # The plan reads shapes from a model folder, so the measured model is written anew.
        setting = Setting.of_measurement(measured)
        with tempfile.TemporaryDirectory() as scratch:
            run = shapes.write_run(
                Path(scratch),
                width=setting.width,
                layers=setting.layers,
                vocabulary=setting.vocabulary,
            )
            config = setting.load_config(run)
            model_folder = run.parent / "model"
            teacher = size_of(model_folder)
            lengths = text_lengths(config, model_folder)
        for row in measured["rows"]:
            comparisons.append(
                _compare_row(row, measured["ranks"], setting, config, teacher, lengths)
            )
    return comparisons


def _compare_row(
    row: dict[str, Any],
    ranks: int,
    setting: Setting,
    config: RunConfig,
    teacher: ModelSize,
    lengths: list[int],
) -> Comparison:
    """Plan the step of one row of `bench scale`."""
    planned_config = grown(config, ranks if row["scaling"] == "weak" else 1)
    # The plan counts texts of the maximum length. These are shorter, so the plan is given the
    # length that their batches are padded to.
    length = padded_length(lengths, row["batch_size"], ranks, config.seed)
    task = planned_config.private_task.model_copy(update={"max_length": length})
    planned_config = planned_config.model_copy(update={"private_task": task})

    # The same formulas give the amounts: one plan for each machine where only one unit costs time.
    units = []
    for rates in _ONE_UNIT.values():
        machine = Machine(1, ranks, rates.hardware())
        stages = plan_run(planned_config, teacher, machine, "fp32")["stages"]
        plan = next(stage for stage in stages if stage["stage"] == row["stage"])
        units.append(plan["step_seconds"])
    return Comparison(
        setting=setting,
        stage=row["stage"],
        scaling=row["scaling"],
        ranks=ranks,
        batch_size=row["batch_size"],
        measured_seconds=row["step_seconds"],
        measured_gib=max(rank["peak_memory_gib"] for rank in row["per_rank"]),
        units=units,
        # Memory does not depend on the rates, so any of the plans has it.
        planned_gib=plan["memory_total_gib"] - plan["memory_gib"]["reserved"],
    )


def text_lengths(config: RunConfig, model_folder: Path) -> list[int]:
    """Return the number of tokens of each public text that `bench scale` reads.

    Args:
        config: the run file.
        model_folder: folder of the model with its tokenizer.
    """
    task = PromptTask.of_section(config.private_task, config.tune.init_text)
    reader = TaskReader(task, load_tokenizer(model_folder), masked=False)
    texts = load_public_texts(config.public_task, "public_task")[0][:MAX_EXAMPLES]
    return [len(encoded.token_ids) for encoded in reader.encode(texts)]


def padded_length(lengths: list[int], batch_size: int, ranks: int, seed: int) -> int:
    """Return the length that the longest part of a batch is padded to, in the median step.

    Args:
        lengths: tokens of each text.
        batch_size: examples of a step.
        ranks: ranks that share them.
        seed: seed of the data order.
    """
    longest = []
    # The texts of a step are chosen by the seed, so these are the ones that were measured.
    for step in range(MEASURED_STEPS):
        chosen = rows_of_like_length(step, batch_size, lengths, seed)
        of_step = 0
        for rank in range(ranks):
            part = rank_batches(chosen, batch_size, rank, ranks)[0]
            of_step = max(of_step, *(lengths[text] for text in part.rows))
        longest.append(of_step)
    return int(statistics.median(longest))


def fit_rates(fitted: list[Comparison]) -> np.ndarray:
    """Return the seconds that one of each unit costs, in the order of `_UNITS`.

    A step's planned time is linear in them, because nothing overlaps computation here. The fit
    minimizes the squared relative error, and no cost is below zero.

    Args:
        fitted: measured steps.
    """
    # Each row is divided by its time, so that residuals are relative and short steps count too.
    design = np.array([each.units for each in fitted])
    seconds = np.array([[each.measured_seconds] for each in fitted])
    costs, _ = nnls(design / seconds, np.ones(len(fitted)))
    return costs


def report(times: list[Measured], memories: list[Measured]) -> str:
    """Return the page that compares plan and measurements.

    Args:
        times: measurements of time.
        memories: measurements of memory; none leaves out that part.
    """
    # The rates are fitted to some settings alone; the others test them.
    comparisons = compare(times)
    fitted = [each for each in comparisons if each.setting in FIT]
    held_out = [each for each in comparisons if each.setting in HELD_OUT]
    costs = fit_rates(fitted)
    for each in comparisons:
        each.planned_seconds = float(np.dot(each.units, costs))
    text = f"""# The plan compared with real ranks

`python benchmarks/prediction.py` made this on {times[0]["device"]} per rank, two cores, gloo, fp32.

## Time

Two ranks. The plan's own formula (`post_dist/planning/`) gives the seconds of a step. \
Four rates of the machine are fitted to {len(fitted)}
measurements of {len(FIT)} settings: {_rates_text(costs)}.

### Held out

{time_table(held_out)}
### Used for the fit

{time_table(fitted)}
"""
    # With strong scaling, the batch is the setting's own.
    if memories:
        strong = [each for each in compare(memories) if each.scaling == "strong"]
        text += f"""## Memory

The plan's total without a fit, in GiB, compared with the peak resident memory above that of a \
rank without the models.

{memory_table(strong)}"""
    return text


def _rates_text(costs: np.ndarray) -> str:
    rates = []
    for (name, unit), cost in zip(_UNITS.items(), costs, strict=True):
        if unit == "s":
            rates.append(f"{name} {cost * 1e6:.0f} us")
        elif cost == 0:
            rates.append(f"{name} free")
        else:
            rates.append(f"{name} {1 / cost / 1e9:.3g} G{unit}")
    return ", ".join(rates)


def time_table(comparisons: Sequence[Comparison]) -> str:
    """Return the table of measured and planned seconds."""
    return _table(
        comparisons, [(each.measured_seconds, each.planned_seconds) for each in comparisons]
    )


def memory_table(comparisons: Sequence[Comparison]) -> str:
    """Return the table of measured and planned memory, in GiB."""
    return _table(comparisons, [(each.measured_gib, each.planned_gib) for each in comparisons])


def _table(comparisons: Sequence[Comparison], values: Sequence[tuple[float, float]]) -> str:
    """Return a table of measured and planned values, and how far they differ."""
    names = [name for name in Setting._fields if name != "batch"]
    heads = ("stage", "ranks", "batch", *names, "measured", "plan", "difference")
    rows = []
    differences = []
    for each, (measured, planned) in zip(comparisons, values, strict=True):
        difference = planned / measured - 1
        differences.append(abs(difference))
        rows.append(
            (
                each.stage,
                each.ranks,
                each.batch_size,
                *(getattr(each.setting, name) for name in names),
                f"{measured:.3f}",
                f"{planned:.3f}",
                f"{difference:+.1%}",
            )
        )
    median = statistics.median(differences)
    summary = f"Difference: {median:.1%} in the median, {max(differences):.1%} at most."
    return f"{markdown_table(heads, rows)}\n{summary}\n"
