"""Kill private tuning at a place of its step, run the same command again, and compare with a run that was left alone.

    DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 PYTHONPATH=tests python tests/privacy/killed_runs.py FOLDER [--times N] [--table FILE]

Every run is a process of its own (forked, so that the libraries are loaded once) and dies by SIGKILL from within, at a random step.
The noise source is the seeded one: only with it can two runs be compared bit for bit.
"""

import argparse
import json
import os
import random
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import tiny
import torch
from faults import at_call, die, fork_command

from post_dist.artifacts import manifest
from post_dist.privacy import ledger, trainer, training
from post_dist.privacy.mechanism import PrivateOptimizer

STEPS = 6


def in_half_a_row(number: int) -> None:
    """Die with half of a step's ledger row written."""
    real, rows = os.write, Counter()

    def write(descriptor: int, data: bytes) -> int:
        if b'"row": "step"' in data:
            rows["step"] += 1
            if rows["step"] == number:
                real(descriptor, data[: len(data) // 2])
                die()
        return real(descriptor, data)

    ledger.os.write = write


def in_half_a_state(number: int) -> None:
    """Die with the state of a step written, but not in its place."""
    real, saved = manifest.Path.rename, Counter()

    def rename(path: Path, target: Path) -> Path:
        if "step-" in path.name:
            saved["state"] += 1
            if saved["state"] == number:
                die()
        return real(path, target)

    manifest.Path.rename = rename


PLACES: dict[str, Callable[[int], None]] = {
    "before the rows are drawn": lambda number: at_call(
        training, "poisson_rows", number, before=True
    ),
    "after the rows are drawn": lambda number: at_call(
        training, "poisson_rows", number, before=False
    ),
    "after a backward pass": lambda number: at_call(
        trainer.ExampleGradients, "__call__", number, before=False
    ),
    "before the intent": lambda number: at_call(ledger.LedgerRun, "intend", number, before=True),
    "in the intent's row": in_half_a_row,
    "after the intent": lambda number: at_call(ledger.LedgerRun, "intend", number, before=False),
    "after the noise": lambda number: at_call(PrivateOptimizer, "add_noise", number, before=False),
    "after the step": lambda number: at_call(PrivateOptimizer, "finish", number, before=False),
    "in the state's file": in_half_a_state,
    "after the state": lambda number: at_call(training, "save_tensors", number, before=False),
}


def run(folder: Path, output: Path, prepare: Callable[[], None] = lambda: None) -> int:
    """Tune in a forked child; its wait status."""
    settings = [
        f"inputs.student={folder / 'student'}",
        "privacy.enabled=true",
        "privacy.noise_multiplier=0.8",
        f"tune.steps={STEPS}",
    ]
    settings += [
        "privacy.declared_examples=160",
        "privacy.noise_source=seeded",
        f"privacy.ledger={output}.ledger",
        "tune.class_bias=true",
    ]
    arguments = [
        "tune",
        str(folder / "run.yaml"),
        f"--output={output}",
        *(f"--set={setting}" for setting in settings),
    ]
    return os.waitpid(fork_command(arguments, {}, folder / "said.txt", prepare), 0)[1]


def outcome(output: Path) -> tuple[bytes, int, int, int]:
    """The prompt's bytes, and of the ledger: runs, charged steps, repeated steps."""
    (weights,) = output.glob("tiny/tune-*/artifact/adapter_model.safetensors")
    biases = json.loads((weights.parent / "task.json").read_text())["class_biases"]
    spendings = list(ledger.read_ledger(Path(f"{output}.ledger")).values())
    charged = sum(spending.charged_steps for spending in spendings)
    return (
        weights.read_bytes() + json.dumps(biases).encode(),
        len(spendings),
        charged,
        charged - sum(len(spending.intents) for spending in spendings),
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--times", type=int, default=1)
    parser.add_argument("--table", type=Path)
    options = parser.parse_args()
    folder: Path = options.folder
    tiny.write_run(folder)
    distilled = fork_command(
        ["distill", str(folder / "run.yaml"), f"--output={folder / 'made'}"],
        {},
        folder / "said.txt",
        lambda: None,
    )
    os.waitpid(distilled, 0)
    next(folder.glob("made/tiny/distill-*/artifact")).rename(folder / "student")
    assert run(folder, folder / "alone") == 0
    expected = outcome(folder / "alone")
    assert expected[1:] == (1, STEPS, 0)
    lines = ["| killed | times | prompt bit-equal | ledger exact |", "|---|---|---|---|"]
    failures = 0
    for place, prepare in PLACES.items():
        right = Counter()
        for time in range(options.times):
            output = folder / f"{place.replace(' ', '-')}-{time}"
            status = run(
                folder, output, lambda prepare=prepare: prepare(random.randrange(1, STEPS + 1))
            )
            assert os.WIFSIGNALED(status), f"{place}: the run was not killed"
            assert os.WTERMSIG(status) == signal.SIGKILL
            assert run(folder, output) == 0, f"{place}: the run did not go on"
            prompt, *spent = outcome(output)
            right["prompt"] += prompt == expected[0]
            right["ledger"] += tuple(spent) == expected[1:]
        failures += 2 * options.times - right.total()
        lines.append(f"| {place} | {options.times} | {right['prompt']} | {right['ledger']} |")
    print("\n".join(lines))
    if options.table:
        about = f"Made by `make faults`; tiny Llama, fp32, one thread, {STEPS} steps, each kill at a random one; torch {torch.__version__}.\n"
        options.table.write_text(
            "# Private tuning under SIGKILL (CPU)\n\n" + about + "\n" + "\n".join(lines) + "\n"
        )
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
