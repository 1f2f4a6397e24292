"""The part `tune` of `on_gpu.py`: private and ordinary tuning steps."""

import tempfile
from itertools import product
from pathlib import Path

import gpu_models
from gpu_page import Page
from gpu_steps import PageMeasure

from post_dist.bench.tune import bench_tune
from post_dist.runtime.distributed import start

TITLE = "Tuning steps: private and ordinary"


def measure(page: Page) -> None:
    """Measure the students of the demo and of GPT2-XL."""
    world = start(0)
    for subject, precision in product(gpu_models.subjects(), gpu_models.PRECISIONS):
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            run = subject.write_run(folder)
            student = subject.write_student(folder)
            config = subject.load_config(run, precision, *gpu_models.COMPILED)
            steps = PageMeasure(page, f"The student of {subject.name}, {precision}")
            found = bench_tune(config, student, world, steps)
            page.add(
                f"Largest relative difference of a gradient: {found['max_difference']:.1e}. "
                f"Shapes: {found['settings']}.\n"
            )
