"""The part `private` of `on_gpu.py`: a whole private run, 200 steps of 512 gradients each."""

import json
import tempfile
import time
from pathlib import Path

import gpu_models
from gpu_page import DEVICE, Page

from post_dist.api import tune
from post_dist.bench.timing import peak_memory_mib, watch_memory

TITLE = "A private run: tuning with epsilon 8"
_STEPS = 200
_BATCH = 512
_TINY_STEPS = 2
_TINY_BATCH = 8


def measure(page: Page) -> None:
    """Tune the demo's student privately, in both precisions."""
    subject = gpu_models.demo()
    on_gpu = DEVICE.type == "cuda"
    steps = _STEPS if on_gpu else _TINY_STEPS
    batch = _BATCH if on_gpu else _TINY_BATCH
    for precision in gpu_models.PRECISIONS:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            run = subject.write_run(folder)
            config = subject.load_config(
                run,
                precision,
                f"inputs.student={subject.write_student(folder)}",
                "inputs.trust_model=true",
                f"output={folder / 'runs'}",
                "privacy.enabled=true",
                "privacy.target_epsilon=8",
                "privacy.declared_examples=6500",
                f"privacy.expected_batch_size={batch}",
                f"privacy.steps={steps}",
                f"privacy.ledger={folder / 'ledger.jsonl'}",
                f"privacy.ledger_anchors={folder / 'anchors'}",
                "tune.class_bias=true",
                f"tune.micro_batch_size_per_gpu={128 if on_gpu else 4}",
            )
            held_mib = watch_memory(DEVICE)
            start = time.perf_counter()
            prompt = tune(config)
            seconds = time.perf_counter() - start
            peak_mib = peak_memory_mib(DEVICE) - held_mib
            statement = json.loads((prompt.artifact / "privacy.json").read_text())
        page.add(
            f"- {precision}: {steps} steps of {batch} gradients in {seconds:.1f} s "
            f"({steps * batch / seconds:,.0f} gradients/s), with reading, the choice of "
            f"micro-batches, ledger and checkpoints. {peak_mib:.0f} MiB. "
            f"Epsilon {statement['epsilon']:.2f}.\n"
        )
