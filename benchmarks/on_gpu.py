"""Measure everything on one GPU, in at most six minutes.

    make gpu
    python benchmarks/on_gpu.py                        # all parts, in this order
    python benchmarks/on_gpu.py tune large             # some parts
    python benchmarks/on_gpu.py --minutes 10 --output FOLDER

The parts:

    tests       the tests marked gpu
    tune        private and ordinary tuning steps, with a profile of each
    distill     a distillation step, plain and compiled, beside the published loop, TRL and Liger
    transfer    a transfer step beside the published loop, also for GPT2-XL
    private     a whole private run: 200 steps of 512 gradients
    large       Llama-3-8B with random weights and a student of two layers, beside the plan

Each part is a process of its own. It prints what it finds, and writes gpu-PART-DEVICE.md after each
section. A part that fails or runs out of time keeps the sections before. No network is needed, and
no model: all weights are random. Without a GPU all sizes are tiny, to try the programs.
"""

import argparse
import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parent
PARTS = ("tests", "tune", "distill", "transfer", "private", "large")
"""Each part is the module `gpu_PART`, from what matters most to what takes longest."""


def main() -> None:
    """Run the chosen parts, or one part in this process."""
    chosen = _parse_arguments()
    if chosen.here:
        for part in chosen.parts:
            measure(part, chosen.output)
        return
    sys.exit(run_parts(chosen.parts, chosen.output, chosen.minutes))


def measure(part: str, output: Path) -> None:
    """Measure one part in this process.

    Args:
        part: one of `PARTS`.
        output: folder of the page.
    """
    # Only here torch is loaded, in the process that uses the GPU.
    from gpu_page import Page

    module = importlib.import_module(f"gpu_{part}")
    module.measure(Page(output, part, module.TITLE))


def run_parts(parts: list[str], output: Path, minutes: float) -> int:
    """Run parts one after the other, each in a process of its own.

    Args:
        parts: their names.
        output: folder of the pages.
        minutes: time for all parts.

    Returns:
        The number of parts that did not end well.
    """
    deadline = time.monotonic() + 60 * minutes
    failures = []
    for part in parts:
        start = time.monotonic()
        problem = _run_part(part, output, deadline - start)
        print(f"{part}: {problem or 'done'} after {time.monotonic() - start:.0f} s\n", flush=True)
        if problem:
            failures.append(f"{part} ({problem})")
    print(f"not complete: {', '.join(failures)}" if failures else "all parts are complete")
    return len(failures)


def _run_part(part: str, output: Path, seconds: float) -> str:
    """Run a part, and return what went wrong."""
    if seconds <= 0:
        return "not started: the time is over"
    command = [sys.executable, __file__, part, "--here", f"--output={output}"]
    # Processes that the part starts are in its group, and end with it.
    process = subprocess.Popen(command, start_new_session=True)
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return "stopped: the time is over"
    return f"exit code {code}" if code else ""


def _parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--minutes", type=float, default=6.0, help="time for all parts (6)")
    parser.add_argument("--output", type=Path, default=BENCHMARKS, help="folder of the pages")
    parser.add_argument("--here", action="store_true", help="measure in this process")
    chosen = parser.parse_args()
    unknown = set(chosen.parts) - set(PARTS)
    if unknown:
        parser.error(f"no such part: {', '.join(sorted(unknown))}; known: {', '.join(PARTS)}")
    chosen.parts = chosen.parts or list(PARTS)
    return chosen


if __name__ == "__main__":
    main()
