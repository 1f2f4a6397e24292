"""The part `large` of `on_gpu.py`: an 8B model with a student of two layers, beside the plan.

The large model is made in the memory of the GPU and is never on a disk.
"""

import tempfile
from pathlib import Path
from typing import Any

import gpu_models
import torch
from gpu_page import DEVICE, Page
from gpu_profile import profile_step
from gpu_steps import PageMeasure
from transformers import AutoModelForCausalLM, PretrainedConfig

from post_dist.bench.timing import device_name, peak_memory_mib, time_steps, watch_memory
from post_dist.bench.tune import bench_tune
from post_dist.bench.workloads import (
    DistillWorkload,
    RequiredSections,
    TransferWorkload,
    Workload,
    WorkloadInputs,
)
from post_dist.config.schema import RunConfig
from post_dist.data.corpus import build_corpus
from post_dist.models.language_model import LanguageModel
from post_dist.models.load import load_tokenizer
from post_dist.models.size import size_of
from post_dist.planning.hardware import Machine, read_hardware
from post_dist.planning.plan import plan_run
from post_dist.runtime.distributed import World, start
from post_dist.runtime.precision import DTYPES, choose_precision
from post_dist.runtime.zero import number_of_parameters

TITLE = "A large model on one GPU"
_WORKLOADS = (DistillWorkload, TransferWorkload)


def measure(page: Page) -> None:
    """Measure a step of each stage, with its profile and the plan's time."""
    world = start(0)
    subject = gpu_models.llama_8b()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        run = subject.write_run(folder)
        student = subject.write_student(folder)
        config = subject.load_config(run, gpu_models.PRECISIONS[0])
        plans = _plans(config, folder / "model")
        inputs = _inputs(config, folder, _random_model(subject.config), world)
        page.add(
            f"- {subject.name}: {number_of_parameters(inputs.teacher) / 1e9:.2f} billion "
            f"parameters; its student: {number_of_parameters(inputs.load_student()) / 1e9:.2f}.\n"
        )
        for workload_class in _WORKLOADS:
            plan = plans.get(workload_class.stage)
            page.add(_measured(workload_class(config, inputs), plan))
        # The target is not needed for tuning, and its memory is.
        del inputs
        steps = PageMeasure(page, "tune")
        bench_tune(config, student, world, steps)


def _inputs(
    config: RunConfig, folder: Path, teacher: LanguageModel, world: World
) -> WorkloadInputs:
    """Collect what the workloads need."""
    tokenizer = load_tokenizer(folder / "model")
    precision = choose_precision(config.engine, world.device)
    sections = RequiredSections.of_run(config)
    return WorkloadInputs(
        sections=sections,
        teacher=teacher,
        tokenizer=tokenizer,
        student_folder=folder / "student",
        corpus=build_corpus(sections.corpus, tokenizer, folder / "corpora", config.seed, world),
        precision=precision,
        world=world,
    )


def _random_model(config: PretrainedConfig) -> LanguageModel:
    """Make a frozen model with random weights on the device."""
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[gpu_models.PRECISIONS[0]])
    return LanguageModel(model, masked=False).eval().requires_grad_(False)


def _plans(config: RunConfig, model: Path) -> dict[str, dict[str, Any]]:
    """Return the plan of each stage on this GPU; nothing for a device that `plan` does not know."""
    name = device_name(DEVICE).lower()
    for known in ("h100", "h200", "a100", "l40s"):
        if known in name:
            machine = Machine(1, 1, read_hardware(known, None))
            stages = plan_run(config, size_of(model), machine, "bf16")["stages"]
            peak = machine.hardware.teraflops["bf16"]
            return {stage["stage"]: stage | {"peak_teraflops": peak} for stage in stages}
    return {}


def _measured(workload: Workload, plan: dict[str, Any] | None) -> str:
    """Time and profile a workload, and return its section."""
    taken = 0

    def step() -> None:
        nonlocal taken
        workload.take_step(taken)
        taken += 1

    held_mib = watch_memory(DEVICE)
    timed = time_steps({"ours": step}, workload.amount, workload.unit, DEVICE, repeats=3)
    seconds = timed["rows"][0]["seconds_per_step"]
    rate = workload.amount / seconds
    text = (
        f"## {workload.stage}\n\n"
        f"{1000 * seconds:.0f} ms, {rate:,.0f} {workload.unit}/s. The device holds "
        f"{held_mib / 1024:.1f} GiB before a step and {peak_memory_mib(DEVICE) / 1024:.1f} at most."
    )
    if plan is not None:
        operations = sum(plan["flops"].values())
        reached = operations / seconds / 1e12
        text += (
            f" The plan counts {operations / 1e12:.1f} TFLOP and {1000 * plan['step_seconds']:.0f} "
            f"ms. The step reaches {reached:.0f} TFLOP/s, {reached / plan['peak_teraflops']:.0%} "
            "of the peak."
        )
    found = text + "\n\n" + profile_step(step, DEVICE).text("ours")
    workload.close()
    return found
