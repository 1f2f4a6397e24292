"""How time and memory of a step grow with vocabulary, positions, prompt length, text length, batch and ranks: exponents and a plot.

python benchmarks/scaling.py [loss] [transfer] [ranks]    # all, or these alone; writes scaling-PROCESSOR.json and .svg beside itself
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import numpy as np
import shapes
import torch

from post_dist.artifacts.task import PromptTask
from post_dist.bench.peers import published_distillation_loss, published_transfer_step
from post_dist.bench.timing import device_name, measure, slug
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

CPU = torch.device("cpu")
Steps = dict[str, Callable[[], object]]


def loss_steps(vocabulary: int, positions: int, width: int = 256) -> Steps:
    """The loss alone, forward and backward, of a student and a teacher that share a frozen head."""
    torch.manual_seed(0)
    head = torch.nn.Linear(width, vocabulary, bias=False).requires_grad_(False)
    student, teacher = (torch.randn(positions, width) for _ in range(2))
    labels, section = torch.randint(vocabulary, (positions,)), Distill()
    pieces = logit_pieces(positions, vocabulary)
    settings = LossSettings(weights_of(section), section.temperature, pieces)

    def ours() -> None:
        hidden = student.clone().requires_grad_(True)
        signal = HiddenSignal(hidden=teacher)
        loss, _ = distillation_loss(hidden, signal, labels, Heads(head, head), settings)
        loss.backward()

    def published() -> None:
        hidden = student.clone().requires_grad_(True)
        published_distillation_loss(
            hidden[None], teacher[None], head, head, labels[None], section
        ).backward()

    return {"published": published, "ours": ours}


def transfer_steps(
    models: ModelPair, reader: TaskReader, *, prompt: int, length: int, batch: int
) -> Steps:
    """A transfer step without its constants; the published one computes them in each."""
    torch.manual_seed(0)
    rows = [Encoded(torch.randint(3, 3000, (length,)).tolist(), length - 1) for _ in range(batch)]
    hidden = torch.randn(batch, models.target.width)
    section = Transfer(steps=1, batch_size=batch, learning_rate=0.1)
    outputs = FixedOutputs(hidden, hidden, hidden)
    objective = TransferObjective(section, reader, rows, outputs, torch.zeros(1), {})
    prompt_nd, source_nd = (
        torch.randn(prompt, models.target.width).requires_grad_(True),
        torch.randn(prompt, models.target.width),
    )
    collated = reader.collate(rows)

    def ours() -> None:
        transfer_losses(models, [objective], [prompt_nd], [list(range(batch))])[0].backward()

    def published() -> None:
        published_transfer_step(
            models.student, models.target, collated, source_nd, prompt_nd, section
        ).backward()

    return {"published": published, "ours": ours}


def ranks_swept(run: Path) -> dict[str, object]:
    """Time and memory of a rank for steps of 16 sequences or rows in all (strong), or on each rank (weak); a rank is one thread."""
    rows = []
    for ranks in (1, 2):
        kept = run.parent / f"{ranks}.json"
        launcher = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            f"--nproc-per-node={ranks}",
            "--master-port=29801",
            "-m",
            "post_dist",
        ]
        settings = (
            "--set=distill.batch_size=16",
            "--set=distill.micro_batch_size_per_gpu=32",
            "--set=transfer.batch_size=16",
        )
        environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        command = [*launcher, "bench", "scale", str(run), f"--write={kept}", *settings]
        subprocess.run(command, check=True, capture_output=True, env=environment)
        row: dict[str, object] = {"value": ranks}
        for each in json.loads(kept.read_text())["rows"]:
            figures = [
                each["step_seconds"],
                1024 * max(rank["peak_memory_gib"] for rank in each["per_rank"]),
            ]
            for scaling in ("strong", "weak") if ranks == 1 else (each["scaling"],):
                row[f"{each['stage']}, {scaling}"] = figures
        rows.append(row)
        print("ranks", row)
    return {"rows": rows}


def swept(name: str, values: list[int], steps_at: Callable[[int], Steps]) -> dict[str, object]:
    """Time and memory at each value, and the exponent between the last two values, which is where the growth shows."""
    rows = []
    for value in values:
        found = measure(steps_at(value), value, name, CPU)
        rows.append(
            {"value": value}
            | {
                row["name"]: [row["seconds_per_step"], row["peak_memory_mib"]]
                for row in found["rows"]
            }
        )
        print(name, rows[-1])
    exponents = {
        way: [
            round(
                float(
                    np.log2(rows[-1][way][kind] / rows[-2][way][kind])
                    / np.log2(values[-1] / values[-2])
                ),
                2,
            )
            for kind in (0, 1)
        ]
        for way in ("published", "ours")
    }
    return {"rows": rows, "exponents_time_memory": exponents}


def plot(found: dict[str, dict], path: Path) -> None:
    """Time above memory, a column for each sweep."""
    mpl.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(found), figsize=(3 * len(found), 5.5), squeeze=False)
    for column, (name, sweep) in enumerate(found.items()):
        for kind, label in enumerate(("seconds", "MiB")):
            axis = axes[kind][column]
            values = [row["value"] for row in sweep["rows"]]
            for way in (way for way in sweep["rows"][0] if way != "value"):
                axis.loglog(
                    values, [row[way][kind] for row in sweep["rows"]], marker="o", label=way
                )
            axis.set_xticks(values, [f"{value:,}" for value in values])
            axis.xaxis.minorticks_off()
            axis.set_xlabel(name)
            axis.set_ylabel(label)
            axis.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    """Run the sweeps, and draw them with those that were run before."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="loss, transfer, ranks")
    parts = parser.parse_args().parts or ["loss", "transfer", "ranks"]
    device = device_name(CPU)
    place = Path(__file__).parent / f"scaling-{slug(device)}"
    kept = place.with_suffix(".json")
    found: dict[str, dict] = json.loads(kept.read_text())["sweeps"] if kept.exists() else {}
    if "loss" in parts:
        found["loss: vocabulary"] = swept(
            "vocabulary", [16_000, 32_000, 64_000, 128_000], lambda value: loss_steps(value, 512)
        )
        found["loss: positions"] = swept(
            "positions", [256, 512, 1024, 2048], lambda value: loss_steps(32_000, value)
        )
    with tempfile.TemporaryDirectory() as scratch:
        run = shapes.write_run(Path(scratch), width=256, layers=8, vocabulary=8000)
        if "transfer" in parts:
            model = load_whole(run.parent / "model", "fp32", CPU)
            task = PromptTask("{text}", (), 512, False, "text")
            reader = TaskReader(task, load_tokenizer(run.parent / "model"), masked=False)
            models = ModelPair(model, model)
            at = {"prompt": 100, "length": 64, "batch": 8}
            for name, values in {
                "prompt": [50, 100, 200, 400],
                "length": [32, 64, 128, 256],
                "batch": [4, 8, 16, 32],
            }.items():
                steps_at = lambda value, name=name: transfer_steps(
                    models, reader, **(at | {name: value})
                )
                found[f"transfer: {name}"] = swept(name, values, steps_at)
        if "ranks" in parts:
            found["ranks"] = ranks_swept(run)
    kept.write_text(json.dumps({"device": device, "sweeps": found}, indent=1) + "\n")
    plot(found, place.with_suffix(".svg"))


if __name__ == "__main__":
    main()
