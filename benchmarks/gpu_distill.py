"""The part `distill` of `on_gpu.py`: a distillation step beside other implementations."""

import tempfile
from pathlib import Path

import gpu_models
from gpu_page import Page
from gpu_steps import PageMeasure

from post_dist.bench.distill import bench_distill
from post_dist.runtime.distributed import start

TITLE = "Distillation steps beside other implementations"


def measure(page: Page) -> None:
    """Measure the demo's teacher and student."""
    world = start(0)
    subject = gpu_models.demo()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        run = subject.write_run(folder)
        teacher = subject.write_teacher(folder)
        config = subject.load_config(run, "bf16", "engine.compile=true")
        steps = PageMeasure(page, f"The student of {subject.name}")
        found = bench_distill(config, teacher, world, steps)
        page.add(
            f"Largest relative difference of an fp32 loss: {found['max_difference']:.1e}. "
            f"Sizes: {found['settings']}.\n"
        )
