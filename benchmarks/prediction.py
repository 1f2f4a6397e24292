"""What `post-dist plan` says of a step beside what two ranks take: time after a fit on other settings, and memory as it is.

python benchmarks/prediction.py time          # a quarter of an hour on two quiet cores; writes prediction-time-PROCESSOR.json
python benchmarks/prediction.py memory        # writes prediction-memory-PROCESSOR.json
python benchmarks/prediction.py compare       # fits, and writes prediction-PROCESSOR.md
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import shapes
import torch
from scipy.optimize import nnls

from post_dist.bench import scale
from post_dist.bench.scale import STEPS, bench_scale
from post_dist.bench.timing import device_name, slug
from post_dist.bench.transfer import MAX_EXAMPLES
from post_dist.config.load import load_run
from post_dist.config.schema import RunConfig
from post_dist.data.order import rank_batches, rows_of_like_length
from post_dist.data.public_text import load_public_texts
from post_dist.data.template import Template
from post_dist.models.load import load_tokenizer
from post_dist.models.size import size_of
from post_dist.planning.hardware import Hardware, Machine
from post_dist.planning.plan import plan_run
from post_dist.planning.scaling import grown
from post_dist.runtime.distributed import start
from post_dist.runtime.stop import end_process

HERE = Path(__file__).resolve().parent
KEYS = ("width", "layers", "vocabulary", "batch", "length", "zero", "group")
FIT = [
    (256, 4, 4000, 8, 64, 1, 2),
    (512, 4, 4000, 8, 64, 1, 2),
    (256, 8, 16000, 16, 64, 0, 2),
    (512, 8, 8000, 8, 128, 2, 1),
    (384, 6, 16000, 16, 64, 3, 2),
    (256, 12, 4000, 16, 128, 1, 1),
    (512, 6, 16000, 16, 64, 0, 1),
    (640, 4, 4000, 8, 64, 3, 1),
]
HELD_OUT = [
    (320, 6, 8000, 16, 64, 1, 2),
    (448, 8, 4000, 8, 128, 1, 1),
    (512, 4, 16000, 16, 64, 2, 2),
    (256, 10, 8000, 16, 128, 3, 2),
    (640, 6, 8000, 8, 64, 0, 2),
    (384, 12, 4000, 8, 64, 1, 2),
    (576, 4, 12000, 16, 64, 3, 1),
    (384, 8, 8000, 32, 64, 2, 1),
    (704, 4, 6000, 8, 128, 1, 2),
]
MEMORY = [
    (2, (768, 8, 8000, 8, 64, 1, 2)),
    (2, (768, 8, 8000, 16, 64, 0, 1)),
    (2, (768, 6, 16000, 8, 64, 3, 2)),
    (2, (1024, 6, 8000, 4, 64, 2, 2)),
    (4, (768, 8, 8000, 8, 64, 1, 4)),
    (4, (640, 8, 16000, 8, 64, 1, 2)),
]
"""Ranks, and a setting whose models are larger than what the libraries bring along."""


def settings_of(values: tuple[int, ...]) -> list[str]:
    """What a setting changes in the benchmarks' run file."""
    _, _, _, batch, length, zero, group = values
    changes = {
        "distill.batch_size": batch,
        "distill.micro_batch_size_per_gpu": 64,
        "corpus.sequence_length": length,
    }
    changes |= {
        "transfer.batch_size": batch,
        "engine.zero_stage": zero,
        "engine.shard_group": group,
        "tune.num_virtual_tokens": 20,
    }
    return [f"{key}={value}" for key, value in changes.items()]


def measure(settings: list[tuple[int, ...]]) -> None:
    """On each rank: every setting one after the other; rank 0 prints."""
    world = start(0)
    with tempfile.TemporaryDirectory() as own:
        scratch = Path(world.from_main(own))
        for number, values in enumerate(settings):
            width, layers, vocabulary = values[:3]
            folder = scratch / str(number)
            if world.is_main:
                shapes.write_run(folder, width=width, layers=layers, vocabulary=vocabulary)
            world.barrier()
            config = load_run(folder / "run.yaml", settings_of(values), None)
            found = bench_scale(config, folder / "model", world) | dict(
                zip(KEYS, values, strict=True)
            )
            if world.is_main:
                print(json.dumps(found), flush=True)
        world.leave()
    end_process(0)


def launch(ranks: int, part: str, **environment: str) -> list[dict[str, Any]]:
    """This program on several ranks; what rank 0 prints."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nproc-per-node={ranks}",
        "--master-port=29640",
        __file__,
        part,
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"} | environment
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def measure_memory() -> list[dict[str, Any]]:
    """Each setting in processes of its own, after a tiny model, so that what libraries load at first use is there before."""
    found = []
    for number, (ranks, _) in enumerate(MEMORY):
        # glibc then gives back what is freed, so that what is resident is what is held.
        _, measured = launch(ranks, f"memory-{number}", MALLOC_MMAP_THRESHOLD_="65536")
        found.append(measured)
        print(measured["rows"][0]["per_rank"][0], flush=True)
    return found


UNITS = {"compute": "flop/s", "link": "B/s", "latency": "s", "memory": "B/s"}


def hardware(compute: float, link: float, latency: float, memory: float) -> Hardware:
    """A machine by operations a second, bytes a second between ranks and in memory, and seconds of each collective."""
    wire = {"gb_per_second": link / 1e9, "latency_us": latency * 1e6}
    share = dict.fromkeys(("compute", "memory", "node", "network", "host"), 1.0)
    host = {"memory_gib": 1e9, "gb_per_second": 1e30}
    rates = {"teraflops": {"fp32": compute / 1e12}, "memory_gb_per_second": memory / 1e9}
    links = {"node": wire | {"gpus": 8}, "network": wire}
    return Hardware.model_validate(
        {"memory_gib": 1e9, **rates, **links, "host": host, "share": share, "overlap": False}
    )


def text_lengths(config: RunConfig, model: Path) -> list[int]:
    """Tokens of the public rows that `bench scale` takes."""
    task = config.private_task
    texts = load_public_texts(config.public_task, "public_task")[0][:MAX_EXAMPLES]
    rows = Template(task.template, load_tokenizer(model), task.max_length, masked=False).encode(
        texts
    )
    return [len(row.token_ids) for row in rows]


def padded_length(lengths: list[int], batch: int, ranks: int, seed: int) -> int:
    """To what the longer part of a batch is padded, in the median of the measured steps."""
    longest = []
    for step in range(STEPS):
        rows = rows_of_like_length(step, batch, lengths, seed)
        longest.append(
            max(
                lengths[row]
                for rank in range(ranks)
                for row in rank_batches(rows, batch, rank, ranks)[0].rows
            )
        )
    return int(statistics.median(longest))


def with_plans(measured: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each row that was measured, with the plan's memory, and how much of each unit the plan's step takes.

    The plan's step is linear in what each unit costs, for nothing runs beside computation here.
    """
    free = {"compute": 1e30, "link": 1e30, "latency": 0.0, "memory": 1e30}
    rows = []
    for each in measured:
        width, layers, vocabulary = (each[key] for key in KEYS[:3])
        with tempfile.TemporaryDirectory() as scratch:
            run = shapes.write_run(Path(scratch), width=width, layers=layers, vocabulary=vocabulary)
            config = load_run(run, settings_of(tuple(each[key] for key in KEYS)), None)
            teacher, lengths = (
                size_of(run.parent / "model"),
                text_lengths(config, run.parent / "model"),
            )
            for row in each["rows"]:
                sized = grown(config, each["ranks"] if row["scaling"] == "weak" else 1)
                # The plan takes texts to be as long as they may be, and these are shorter.
                length = padded_length(lengths, row["batch_size"], each["ranks"], config.seed)
                sized = sized.model_copy(
                    update={
                        "private_task": sized.private_task.model_copy(update={"max_length": length})
                    }
                )
                machines = [
                    Machine(1, each["ranks"], hardware(**free | {unit: 1.0})) for unit in UNITS
                ]
                stages = [
                    stage
                    for machine in machines
                    for stage in plan_run(sized, teacher, machine, "fp32")["stages"]
                ]
                plans = [stage for stage in stages if stage["stage"] == row["stage"]]
                reserved = plans[0]["memory_gib"]["reserved"]
                found = {
                    "amounts": [plan["step_seconds"] for plan in plans],
                    "planned_gib": plans[0]["memory_total_gib"] - reserved,
                }
                found["gib"] = max(rank["peak_memory_gib"] for rank in row["per_rank"])
                rows.append(
                    {key: each[key] for key in KEYS} | {"ranks": each["ranks"]} | row | found
                )
    return rows


def compared(times: list[dict[str, Any]], memories: list[dict[str, Any]]) -> str:
    """The tables."""
    rows = with_plans(times)
    fitted, held = (
        [row for row in rows if tuple(row[key] for key in KEYS) in chosen]
        for chosen in (FIT, HELD_OUT)
    )
    # Least squares of the relative error, and no unit costs less than nothing.
    design = np.array([row["amounts"] for row in fitted]) / np.array(
        [[row["step_seconds"]] for row in fitted]
    )
    costs, _ = nnls(design, np.ones(len(fitted)))
    for row in rows:
        row["planned_seconds"] = float(np.dot(row["amounts"], costs))
    reached = ", ".join(
        f"{name} {cost * 1e6:.0f} us"
        if unit == "s"
        else f"{name} {1 / cost / 1e9:.3g} G{unit}"
        if cost
        else f"{name} free"
        for (name, unit), cost in zip(UNITS.items(), costs, strict=True)
    )
    text = f"""# The plan beside real ranks

`python benchmarks/prediction.py` on {times[0]["device"]} a rank, two cores, gloo, fp32.

## Time

Two ranks. A step's time is the plan's own formula (`post_dist/planning/`), with four figures of the machine fitted to
{len(fitted)} measurements of {len(FIT)} settings: {reached}.

### Held out

{table(held, "step_seconds", "planned_seconds")}
### Fitted to

{table(fitted, "step_seconds", "planned_seconds")}
"""
    if memories:
        strong = [row for row in with_plans(memories) if row["scaling"] == "strong"]
        text += f"""## Memory

The plan's sum without a fit, in GiB, beside the peak of resident memory above what a rank held without the models.

{table(strong, "gib", "planned_gib")}"""
    return text


def table(rows: list[dict[str, Any]], real: str, planned: str) -> str:
    """Each row, and how far they are apart."""
    heads = [
        "stage",
        "ranks",
        "rows",
        *(key for key in KEYS if key != "batch"),
        "measured",
        "plan",
        "apart",
    ]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for row in rows:
        cells = [
            row["stage"],
            row["ranks"],
            row["batch_size"],
            *(row[key] for key in KEYS if key != "batch"),
        ]
        cells += [f"{row[real]:.3f}", f"{row[planned]:.3f}", f"{row[planned] / row[real] - 1:+.1%}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    apart = [abs(row[planned] / row[real] - 1) for row in rows]
    return "\n".join(
        [
            *lines,
            "",
            f"Apart: {statistics.median(apart):.1%} in the median and {max(apart):.1%} at most.",
            "",
        ]
    )


def main() -> None:
    """Measure, or compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", help="time, memory or compare")
    part = parser.parse_args().part
    if os.environ.get("WORLD_SIZE"):
        if part == "time":
            measure(FIT + HELD_OUT)
        else:
            scale.STEPS = 2
            _, setting = MEMORY[int(part.removeprefix("memory-"))]
            measure([(128, 2, *setting[2:]), setting])
        return
    kept = {name: HERE / f"prediction-{name}-{processor()}.json" for name in ("time", "memory")}
    if part in kept:
        kept[part].write_text(
            json.dumps(launch(2, "time") if part == "time" else measure_memory(), indent=1) + "\n"
        )
    times, memories = (
        json.loads(file.read_text()) if file.exists() else [] for file in kept.values()
    )
    (HERE / f"prediction-{processor()}.md").write_text(compared(times, memories))


def processor() -> str:
    """For the names of files."""
    return slug(device_name(torch.device("cpu")))


if __name__ == "__main__":
    main()
