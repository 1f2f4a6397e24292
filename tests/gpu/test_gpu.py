"""What a CPU cannot show: fp16 with a scaled loss, int8 gathers, pinned offload, GPU kernels.

One GPU is enough.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import tiny
import torch
from privacy.gradient_checks import change_each_example

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

FP32 = {"precision": "fp32"}
LAYOUTS = {
    "bf16": ({"precision": "bf16"}, 2e-2),
    "fp16, scaled loss": ({"precision": "fp16"}, 2e-2),
    "ZeRO++ int8 gathers": ({"precision": "bf16", "quantized_gathers": "true"}, 1e-1),
    "offloaded, pinned": (
        {"precision": "bf16", "offload": "cpu", "offload_optimizer": "true", "zero_stage": "2"},
        2e-2,
    ),
    "activations computed twice": ({"precision": "bf16", "activation_checkpointing": "true"}, 2e-2),
}
PRIVATE = [
    "privacy.enabled=true",
    "privacy.target_epsilon=8",
    "privacy.declared_examples=160",
    "tune.class_bias=true",
]


def run_stage(
    post_dist: Callable, stage: str, run: Path, output: Path, settings: list[str]
) -> Path:
    """Run a stage to its end and return its folder."""
    done = post_dist(stage, run, *(f"--set={setting}" for setting in settings), "--output", output)
    assert done.returncode == 0, done.stderr[-3000:]
    (folder,) = output.glob(f"tiny/{stage}-????????")
    return folder


def metric(folder: Path, name: str) -> list[float]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)[name] for line in lines]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_distils_as_fp32_does(tmp_path: Path, post_dist: Callable, layout: str) -> None:
    run = tiny.write_run(tmp_path)
    engine, tolerance = LAYOUTS[layout]

    def losses(name: str, settings: dict[str, str]) -> list[float]:
        given = [f"engine.{key}={value}" for key, value in settings.items()]
        return metric(run_stage(post_dist, "distill", run, tmp_path / name, given), "lm")

    reference = losses("fp32", FP32)
    assert losses("other", engine) == pytest.approx(reference, rel=tolerance)


class Learned(NamedTuple):
    """What a pipeline learned: losses of its stages, and the area under the curve by row."""

    distill: list[float]
    transfer: list[float]
    areas: dict[str, float]


def test_the_pipeline_learns_as_on_a_cpu(
    tmp_path: Path, post_dist: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny.write_run(tmp_path)
    settings = [
        "--set=transfer.objective=proxy",
        "--set=transfer.scores=classes",
        "--set=transfer.match_class_shares=true",
    ]

    def learned(place: str) -> Learned:
        output = tmp_path / place
        done = post_dist("pipeline", run, *settings, "--output", output, "--json")
        assert done.returncode == 0, done.stderr[-3000:]
        (distilled,) = output.glob("tiny/distill-????????")
        transfer = []
        for folder in sorted(output.glob("tiny/transfer-????????")):
            transfer += metric(folder, "loss")
        areas = {row["name"]: row["auc"] for row in json.loads(done.stdout)["rows"]}
        return Learned(metric(distilled, "lm"), transfer, areas)

    on_gpu = learned("gpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    on_cpu = learned("cpu")
    assert on_gpu.distill == pytest.approx(on_cpu.distill, rel=1e-4)
    assert on_gpu.transfer == pytest.approx(on_cpu.transfer, rel=1e-2)
    assert on_gpu.areas == pytest.approx(on_cpu.areas, abs=0.02)


@pytest.mark.parametrize(
    ("family", "share"), [("gpt2", True), ("llama", True), ("llama", False), ("roberta", False)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_changing_one_example_leaves_the_others_bit_for_bit(
    family: str, share: bool, dtype: torch.dtype
) -> None:
    change_each_example(family, dtype, torch.device("cuda"), share=share)


def test_a_private_run_repeats_itself_bit_for_bit(tmp_path: Path, post_dist: Callable) -> None:
    """What a killed run relies on.

    The step that is repeated has the same sum, gets the same noise, and costs nothing.
    """
    run = tiny.write_run(tmp_path)
    bf16 = "engine.precision=bf16"
    distilled = run_stage(post_dist, "distill", run, tmp_path / "student", [bf16])
    student = distilled / "artifact"
    settings = [*PRIVATE, "privacy.noise_source=seeded", f"inputs.student={student}", bf16]
    digests = set()
    for place in ("one", "other"):
        places = [
            f"privacy.ledger={tmp_path / place}.jsonl",
            f"privacy.ledger_anchors={tmp_path / place}.anchors",
        ]
        folder = run_stage(post_dist, "tune", run, tmp_path / place, [*settings, *places])
        weights = folder / "artifact" / "adapter_model.safetensors"
        digests.add(hashlib.sha256(weights.read_bytes()).hexdigest())
    assert len(digests) == 1


@pytest.mark.parametrize("stage", ["distill", "tune", "transfer"])
def test_a_stage_is_benchmarked(tmp_path: Path, post_dist: Callable, stage: str) -> None:
    run = tiny.write_run(tmp_path)
    student = run_stage(post_dist, "distill", run, tmp_path / "student", []) / "artifact"
    done = post_dist("bench", stage, run, f"--set=inputs.student={student}", "--json")
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["device"] == torch.cuda.get_device_name()
