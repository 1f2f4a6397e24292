"""The demo's own run file on its real model and reviews, with few steps."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from post_dist.artifacts.prompt import read_prompt
from post_dist.models.load import load_whole


@pytest.mark.timeout(1200)
def test_the_demo_on_its_real_model(tmp_path: Path, post_dist: Callable) -> None:
    from peft import PeftModel

    demo = tmp_path / "demo"
    assert post_dist("init", demo).returncode == 0
    fetched = subprocess.run(
        [sys.executable, demo / "fetch_demo.py"],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert fetched.returncode == 0, fetched.stderr
    settings = [
        "distill.steps=1",
        "distill.batch_size=4",
        "corpus.max_tokens=10000",
        "corpus.held_out_sequences=4",
        "warm_start.steps=1",
        "warm_start.batch_size=4",
        "tune.steps=2",
        "privacy.steps=2",
        "privacy.expected_batch_size=8",
        "transfer.steps=1",
        "transfer.batch_size=4",
        "public_task.max_rows=8",
        "public_task.max_length=32",
        "private_task.max_length=32",
        "evaluate.split=validation",
        "private_task.validation_share=0.003",
        "private_task.test_share=0.99",
        "tune.micro_batch_size_per_gpu=1",
    ]
    done = post_dist(
        "pipeline",
        demo / "demo.yaml",
        *(f"--set={setting}" for setting in settings),
        "--json",
        timeout=800,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    accuracy = {row["name"]: row["accuracy_micro"] for row in rows}
    print(accuracy)
    private = {row["name"] for row in rows if row["epsilon"] is not None}
    named = {"student + prompt", "transferred", "ensemble"}
    assert private == {f"{name}, epsilon 8" for name in (*named, "DP logistic regression")}
    assert named < set(accuracy), "the same prompts without privacy"
    assert accuracy["zero-shot"] > 0.65, (
        "the pretrained model tells good reviews from bad ones by itself"
    )

    folder = next(demo.glob("runs/demo/transfer-*/artifact"))
    model = load_whole(demo / "model", "fp32", torch.device("cpu"))
    input_ids = torch.randint(100, 40000, (2, 12))
    prompt = read_prompt(folder).embeddings
    with torch.no_grad():
        ours = model(input_ids, None, prompt, torch.full((2,), 11))
        theirs = PeftModel.from_pretrained(model.model, str(folder))(input_ids=input_ids).logits[
            :, -1
        ]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
