"""The part `transfer` of `on_gpu.py`: a transfer step beside the published loop."""

import tempfile
from pathlib import Path

import gpu_models
from gpu_page import Page
from gpu_steps import PageMeasure

from post_dist.bench.transfer import bench_transfer
from post_dist.runtime.distributed import start

TITLE = "Transfer steps beside the published loop"


def measure(page: Page) -> None:
    """Measure the demo's target and GPT2-XL."""
    world = start(0)
    for subject in gpu_models.subjects():
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            run = subject.write_run(folder)
            target = subject.write_teacher(folder)
            student = subject.write_student(folder)
            config = subject.load_config(run, "bf16", *gpu_models.COMPILED)
            steps = PageMeasure(page, f"{subject.name} and its student")
            found = bench_transfer(config, target, student, world, steps)
            page.add(
                f"Largest relative difference in fp32: {found['max_difference']:.1e}. "
                f"Before the first step: {found['once']}. Shapes: {found['settings']}.\n"
            )
