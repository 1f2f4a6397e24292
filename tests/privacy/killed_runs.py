"""Kill private tuning at a place of its step, run the same command again, and compare the results.

    export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 PYTHONPATH=tests
    python tests/privacy/killed_runs.py FOLDER [--times N] [--table FILE] [--adapter lora]

The reference is a run that was left alone. Every run is a process of its own (forked, so that the
libraries are loaded once) and dies by SIGKILL from within, at a random step. The noise source is
the seeded one: only with it can two runs be compared bit for bit.
"""

import argparse
import json
import os
import random
import signal
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import tiny
import torch
from faults import at_call, die, fork_command

from post_dist.privacy import gradients, ledger, trainer, tuned_adapter
from post_dist.privacy.mechanism import PrivateOptimizer
from post_dist.privacy.sampling import PoissonSampler
from post_dist.privacy.spending import read_ledger

STEPS = 6


def in_half_a_row(number: int) -> None:
    """Die with half of a step's ledger row written."""
    real = os.write
    rows = Counter()

    def write(descriptor: int, data: bytes) -> int:
        if b'"row": "step"' in data:
            rows["step"] += 1
            if rows["step"] == number:
                real(descriptor, data[: len(data) // 2])
                die()
        return real(descriptor, data)

    os.write = write


def in_half_a_state(number: int) -> None:
    """Die with the state of a step written, but not in its place."""
    real = Path.rename
    saved = Counter()

    def rename(path: Path, target: Path) -> Path:
        if "step-" in path.name:
            saved["state"] += 1
            if saved["state"] == number:
                die()
        return real(path, target)

    Path.rename = rename


def after_a_backward_pass(number: int) -> None:
    """Die with the gradients of a micro-batch computed."""
    for kind in (gradients.ExampleGradients, tuned_adapter.AdapterGradients):
        at_call(kind, "__call__", number, before=False)


ADAPTERS = {
    "prompt": ("tune.class_bias=true",),
    "lora": ("tune.adapter=lora", "tune.lora.upper_layers=1", "evaluate.baselines=[]"),
    "prefix": ("tune.adapter=prefix", "evaluate.baselines=[]"),
}
"""Settings of what is tuned."""

PLACES: dict[str, Callable[[int], None]] = {
    "before the examples are drawn": partial(at_call, PoissonSampler, "draw", before=True),
    "after the examples are drawn": partial(at_call, PoissonSampler, "draw", before=False),
    "after a backward pass": after_a_backward_pass,
    "before the intent": partial(at_call, ledger.LedgerRun, "intend", before=True),
    "in the intent's row": in_half_a_row,
    "after the intent": partial(at_call, ledger.LedgerRun, "intend", before=False),
    "after the noise": partial(at_call, PrivateOptimizer, "add_noise", before=False),
    "after the step": partial(at_call, PrivateOptimizer, "finish", before=False),
    "in the state's file": in_half_a_state,
    "after the state": partial(at_call, trainer, "save_tensors", before=False),
}


class Outcome(NamedTuple):
    """The prompt's bytes, and of the ledger: runs, charged steps, repeated steps."""

    prompt: bytes
    runs: int
    charged: int
    repeated: int


def run(
    folder: Path, output: Path, adapter: str, prepare: Callable[[], None] = lambda: None
) -> int:
    """Tune in a forked child; returns its wait status."""
    settings = [
        f"inputs.student={folder / 'student'}",
        "privacy.enabled=true",
        "privacy.noise_multiplier=0.8",
        "privacy.declared_examples=160",
        "privacy.noise_source=seeded",
        f"privacy.ledger={output}.ledger",
        f"privacy.ledger_anchors={output}.anchors",
        f"tune.steps={STEPS}",
        *ADAPTERS[adapter],
    ]
    arguments = ["tune", str(folder / "run.yaml"), f"--output={output}"]
    arguments += [f"--set={setting}" for setting in settings]
    child = fork_command(arguments, {}, folder / "said.txt", prepare)
    return os.waitpid(child, 0)[1]


def outcome(output: Path) -> Outcome:
    """Read what a finished run left."""
    (weights,) = output.glob("tiny/tune-*/artifact/adapter_model.safetensors")
    biases = json.loads((weights.parent / "task.json").read_text())["class_biases"]
    spendings = list(read_ledger(Path(f"{output}.ledger")).runs.values())
    charged = sum(spending.charged_steps for spending in spendings)
    taken = sum(len(spending.intents) for spending in spendings)
    prompt = weights.read_bytes() + json.dumps(biases).encode()
    return Outcome(prompt, len(spendings), charged, charged - taken)


def make_student(folder: Path) -> None:
    """Write a run file, its data and a distilled student into a folder."""
    tiny.write_run(folder)
    arguments = ["distill", str(folder / "run.yaml"), f"--output={folder / 'made'}"]
    distilled = fork_command(arguments, {}, folder / "said.txt", lambda: None)
    os.waitpid(distilled, 0)
    next(folder.glob("made/tiny/distill-*/artifact")).rename(folder / "student")


def kill_and_resume(folder: Path, output: Path, adapter: str, place: str) -> Outcome:
    """Kill a run at a random step, run the command again, and read what it left."""
    number = random.randrange(1, STEPS + 1)
    status = run(folder, output, adapter, partial(PLACES[place], number))
    assert os.WIFSIGNALED(status), f"{place}: the run was not killed"
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert run(folder, output, adapter) == 0, f"{place}: the run did not resume"
    return outcome(output)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--times", type=int, default=1)
    parser.add_argument("--table", type=Path)
    parser.add_argument("--adapter", choices=ADAPTERS, default="prompt")
    parser.add_argument("--places", nargs="+", choices=PLACES, default=list(PLACES))
    options = parser.parse_args()
    folder: Path = options.folder
    make_student(folder)
    assert run(folder, folder / "alone", options.adapter) == 0
    expected = outcome(folder / "alone")
    assert expected[1:] == (1, STEPS, 0)
    lines = ["| killed | times | prompt bit-equal | ledger exact |", "|---|---|---|---|"]
    failures = 0
    for place in options.places:
        right = Counter()
        for time in range(options.times):
            output = folder / f"{place.replace(' ', '-')}-{time}"
            found = kill_and_resume(folder, output, options.adapter, place)
            right["prompt"] += found.prompt == expected.prompt
            right["ledger"] += found[1:] == expected[1:]
        failures += 2 * options.times - right.total()
        lines.append(f"| {place} | {options.times} | {right['prompt']} | {right['ledger']} |")
    print("\n".join(lines))
    if options.table:
        title = "# Private tuning under SIGKILL (CPU)"
        about = (
            f"Made by `make faults`; tiny Llama, fp32, one thread, {STEPS} steps, "
            f"each kill at a random one; torch {torch.__version__}."
        )
        table = "\n".join(lines)
        options.table.write_text(f"{title}\n\n{about}\n\n{table}\n")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
