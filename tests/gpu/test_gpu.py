"""What a CPU cannot run: half precision with a scaled loss, int8 gathers, pinned offload. One GPU is enough."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

FP32 = {"precision": "fp32"}
LAYOUTS = {
    "bf16": ({"precision": "bf16"}, 2e-2),
    "fp16, scaled loss": ({"precision": "fp16"}, 2e-2),
    "ZeRO++ int8 gathers": ({"precision": "bf16", "quantized_gathers": "true"}, 1e-1),
    "offloaded, pinned": ({"precision": "bf16", "offload": "cpu", "offload_optimizer": "true", "zero_stage": "2"}, 2e-2),
    "activations computed twice": ({"precision": "bf16", "activation_checkpointing": "true"}, 2e-2),
}


def losses(post_dist: Callable, run: Path, output: Path, engine: dict[str, str]) -> list[float]:
    settings = [f"--set=engine.{name}={value}" for name, value in engine.items()]
    done = post_dist("distill", run, *settings, "--output", output)
    assert done.returncode == 0, done.stderr[-3000:]
    (metrics,) = output.glob("tiny/distill-*/metrics.jsonl")
    return [json.loads(line)["lm"] for line in metrics.read_text().splitlines()]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_distils_as_fp32_does(tmp_path: Path, post_dist: Callable, layout: str) -> None:
    run = tiny.write_run(tmp_path)
    engine, tolerance = LAYOUTS[layout]
    reference = losses(post_dist, run, tmp_path / "fp32", FP32)
    assert losses(post_dist, run, tmp_path / "other", engine) == pytest.approx(reference, rel=tolerance)
