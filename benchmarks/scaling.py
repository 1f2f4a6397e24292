"""Measure how time and memory of a step grow with vocabulary, text, prompt, batch and ranks.

    python benchmarks/scaling.py                   # all parts
    python benchmarks/scaling.py loss transfer     # these parts; the others keep their results

The parts:

    loss        the loss of distill alone, over vocabulary and positions
    transfer    a step of transfer, over prompt length, text length and batch size
    ranks       a step of distill and of transfer on one and on two ranks

It takes about half an hour on two cores, and writes scaling-PROCESSOR.json and .svg. The JSON file
has, for each sweep, time and memory at each value, and the exponents of their growth.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import shapes
import torch
from processor import CPU, results_file, run_on_ranks

from post_dist.artifacts.task import PromptTask
from post_dist.bench.peers.distillation import published_distillation_loss
from post_dist.bench.peers.transfer import published_transfer_step
from post_dist.bench.timing import device_name, time_steps
from post_dist.config.schema import Distill, Transfer
from post_dist.data.task_reader import TaskReader
from post_dist.data.template import Encoded
from post_dist.losses.distillation import LossSettings, distillation_loss
from post_dist.losses.heads import Heads
from post_dist.losses.pieces import logit_pieces
from post_dist.losses.signals import HiddenSignal
from post_dist.losses.terms import weights_of
from post_dist.models.load import load_tokenizer, load_whole
from post_dist.stages.transfer.objective import FixedOutputs, ModelPair, TransferObjective
from post_dist.stages.transfer.step_losses import transfer_losses

PARTS = ("loss", "transfer", "ranks")
RANKS = (1, 2)
TRANSFER_SWEEPS = {
    "prompt": [50, 100, 200, 400],
    "length": [32, 64, 128, 256],
    "batch": [4, 8, 16, 32],
}
VARIANTS = ("published", "ours")
_LOSS_WIDTH = 256


@dataclass(frozen=True)
class TransferShape:
    """Prompt tokens, text tokens and examples of a step. A sweep changes one of them."""

    prompt: int = 100
    length: int = 64
    batch: int = 8


Steps = dict[str, Callable[[], object]]
Sweep = dict[str, Any]
"""The rows of a sweep, and its exponents. A row has [seconds, MiB] by the name of the variant."""


def loss_steps(vocabulary: int, positions: int) -> Steps:
    """Return the distillation loss alone, forward and backward, as published and as ours.

    Student and teacher share a frozen head.

    Args:
        vocabulary: columns of the logits.
        positions: tokens of all sequences.
    """
    # Random values cost as much as real ones. Both variants get the same.
    torch.manual_seed(0)
    head = torch.nn.Linear(_LOSS_WIDTH, vocabulary, bias=False).requires_grad_(False)
    student = torch.randn(positions, _LOSS_WIDTH)
    teacher = torch.randn(positions, _LOSS_WIDTH)
    labels = torch.randint(vocabulary, (positions,))
    section = Distill()
    pieces = logit_pieces(positions, vocabulary)
    settings = LossSettings(weights_of(section), section.temperature, pieces)

    def ours() -> None:
        hidden = student.clone().requires_grad_(True)
        signal = HiddenSignal(hidden=teacher)
        loss, _ = distillation_loss(hidden, signal, labels, Heads(head, head), settings)
        loss.backward()

    def published() -> None:
        hidden = student.clone().requires_grad_(True)
        loss = published_distillation_loss(
            hidden[None], teacher[None], head, head, labels[None], section
        )
        loss.backward()

    return {"published": published, "ours": ours}


def transfer_steps(models: ModelPair, reader: TaskReader, shape: TransferShape) -> Steps:
    """Return a step of transfer, as published and as ours.

    Our step does not include the outputs that do not depend on the prompt: they are computed once.
    The published step computes them each time. Ours are random hidden states here.

    Args:
        models: student and target.
        reader: a task without label words.
        shape: sizes of the step.
    """
    # Texts of one length, so that no step pads. Ids below 3 are special tokens.
    torch.manual_seed(0)
    examples = []
    for _ in range(shape.batch):
        token_ids = torch.randint(3, len(reader.tokenizer), (shape.length,)).tolist()
        examples.append(Encoded(token_ids, shape.length - 1))
    # The objective of our step, and the prompts of both.
    hidden = torch.randn(shape.batch, models.target.width)
    section = Transfer(objective="published", steps=1, batch_size=shape.batch, learning_rate=0.1)
    outputs = FixedOutputs(source=hidden, source_prompted=hidden, target=hidden)
    offsets = torch.zeros(1)
    objective = TransferObjective(section, reader, examples, outputs, offsets, statistics={})
    prompt_nd = torch.randn(shape.prompt, models.target.width).requires_grad_(True)
    source_nd = torch.randn(shape.prompt, models.target.width)
    collated = reader.collate(examples)

    def ours() -> None:
        chosen = list(range(shape.batch))
        (loss,) = transfer_losses(models, [objective], [prompt_nd], [chosen])
        loss.backward()

    def published() -> None:
        loss = published_transfer_step(
            models.student, models.target, collated, source_nd, prompt_nd, section
        )
        loss.backward()

    return {"published": published, "ours": ours}


def sweep(name: str, values: list[int], steps_at: Callable[[int], Steps]) -> Sweep:
    """Measure time and memory at each value of one quantity.

    Args:
        name: name of the quantity.
        values: its values, rising.
        steps_at: the variants of a step at a value.

    Returns:
        `rows`, and `exponents_time_memory`: exponents of growth from the last value but one to the
        last, where constant parts matter least.
    """
    # Time and memory of the variants at each value.
    rows: list[dict[str, Any]] = []
    for value in values:
        row: dict[str, Any] = {"value": value}
        for measured in time_steps(steps_at(value), value, name, CPU)["rows"]:
            row[measured["name"]] = [measured["seconds_per_step"], measured["peak_memory_mib"]]
        rows.append(row)
        print(name, row)

    # The slope of the last segment in a log-log plot.
    exponents = {}
    growth = np.log2(values[-1] / values[-2])
    for variant in VARIANTS:
        ratios = np.array(rows[-1][variant]) / np.array(rows[-2][variant])
        exponents[variant] = [round(float(each), 2) for each in np.log2(ratios) / growth]
    return {"rows": rows, "exponents_time_memory": exponents}


def sweep_ranks(run: Path) -> Sweep:
    """Measure a step of distill and of transfer on one and on two ranks, each of one thread.

    A step has 16 examples in all (strong scaling), or 16 on each rank (weak scaling).

    Args:
        run: the run file.
    """
    settings = (
        "--set=distill.batch_size=16",
        "--set=distill.micro_batch_size_per_gpu=32",
        "--set=transfer.batch_size=16",
    )
    rows = []
    for ranks in RANKS:
        result = run.parent / f"{ranks}.json"
        bench = ("-m", "post_dist", "bench", "scale", str(run), f"--write={result}")
        run_on_ranks(ranks, (*bench, *settings))
        row: dict[str, Any] = {"value": ranks}
        for measured in json.loads(result.read_text())["rows"]:
            peak_gib = max(rank["peak_memory_gib"] for rank in measured["per_rank"])
            # On one rank, strong and weak scaling are the same measurement.
            scalings = ("strong", "weak") if ranks == 1 else (measured["scaling"],)
            for scaling in scalings:
                line = f"{measured['stage']}, {scaling}"
                row[line] = [measured["step_seconds"], 1024 * peak_gib]
        rows.append(row)
        print("ranks", row)
    return {"rows": rows}


def loss_sweeps() -> dict[str, Sweep]:
    """Run the sweeps of the loss."""
    vocabularies = [16_000, 32_000, 64_000, 128_000]
    positions = [256, 512, 1024, 2048]
    return {
        "loss: vocabulary": sweep("vocabulary", vocabularies, partial(loss_steps, positions=512)),
        "loss: positions": sweep("positions", positions, partial(loss_steps, 32_000)),
    }


def transfer_sweeps(model_folder: Path) -> dict[str, Sweep]:
    """Run the sweeps of the transfer step, with one model as student and target.

    Args:
        model_folder: folder of the model.
    """
    model = load_whole(model_folder, "fp32", CPU)
    models = ModelPair(model, model)
    task = PromptTask("{text}", (), max_length=512, allow_multi_token=False, init_text="")
    reader = TaskReader(task, load_tokenizer(model_folder), masked=False)

    def steps_at(quantity: str, value: int) -> Steps:
        return transfer_steps(models, reader, replace(TransferShape(), **{quantity: value}))

    found = {}
    for quantity, values in TRANSFER_SWEEPS.items():
        found[f"transfer: {quantity}"] = sweep(quantity, values, partial(steps_at, quantity))
    return found


def plot(sweeps: dict[str, Sweep], path: Path) -> None:
    """Plot time above memory, with a column for each sweep.

    Args:
        sweeps: the sweeps by name.
        path: the SVG file.
    """
    mpl.use("svg")
    from matplotlib import pyplot

    # Log-log axes show a power law as a straight line.
    columns = len(sweeps)
    figure, axes = pyplot.subplots(2, columns, figsize=(3 * columns, 5.5), squeeze=False)
    for column, (name, swept) in enumerate(sweeps.items()):
        values = [row["value"] for row in swept["rows"]]
        lines = [line for line in swept["rows"][0] if line != "value"]
        for kind, label in enumerate(("seconds", "MiB")):
            axis = axes[kind][column]
            for line in lines:
                heights = [row[line][kind] for row in swept["rows"]]
                axis.loglog(values, heights, marker="o", label=line)
            # Ticks at the measured values alone, in plain numbers.
            axis.set_xticks(values, [f"{value:,}" for value in values])
            axis.xaxis.minorticks_off()
            axis.set_xlabel(name)
            axis.set_ylabel(label)
            axis.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    """Run the chosen sweeps, and plot them together with those that were run before."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; default all")
    parts = parser.parse_args().parts or PARTS
    unknown = set(parts) - set(PARTS)
    if unknown:
        parser.error(f"no part {', '.join(sorted(unknown))}: choose from {', '.join(PARTS)}")

    # Parts that are not run again keep their results.
    path = results_file("scaling", ".json")
    sweeps: dict[str, Sweep] = json.loads(path.read_text())["sweeps"] if path.exists() else {}
    with tempfile.TemporaryDirectory() as scratch:
        run = shapes.write_run(Path(scratch), width=256, layers=8, vocabulary=8000)
        if "loss" in parts:
            sweeps |= loss_sweeps()
        if "transfer" in parts:
            sweeps |= transfer_sweeps(run.parent / "model")
        if "ranks" in parts:
            sweeps["ranks"] = sweep_ranks(run)
    measured = {"device": device_name(CPU), "sweeps": sweeps}
    path.write_text(json.dumps(measured, indent=1) + "\n")
    plot(sweeps, results_file("scaling", ".svg"))


if __name__ == "__main__":
    main()
