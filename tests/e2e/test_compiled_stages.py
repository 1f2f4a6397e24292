"""Stages whose models torch compiles, beside the plain ones."""

from collections.abc import Callable
from pathlib import Path

import torch
from e2e.test_head import write_run
from torch._dynamo.utils import counters

from post_dist.artifacts.lora import Lora
from post_dist.artifacts.prompt import read_prompt


def values(output: Path) -> list[torch.Tensor]:
    """Return what the three stages of a run have trained."""
    found = []
    for stage in ("warm_start", "tune", "transfer"):
        (folder,) = output.rglob(f"{stage}-????????/artifact")
        prompt = read_prompt(folder, "public prompt" if stage == "warm_start" else "soft prompt")
        found.append(prompt.embeddings)
        if isinstance(prompt.adapter, Lora):
            found += prompt.adapter.factors.values()
    return found


def test_compiled_stages_make_the_same_prompts(
    tmp_path: Path, main: Callable, without_fusion: None
) -> None:
    run = write_run(tmp_path)
    settings = (
        "--set=tune.adapter=lora",
        "--set=transfer.adapter=lora",
        "--set=engine.precision=fp32",
        "--set=privacy.enabled=false",
    )
    made = {}
    compiled = {}
    for value in ("false", "true"):
        output = tmp_path / value
        given = (*settings, f"--set=engine.compile={value}", f"--output={output}")
        for stage in ("warm-start", "tune", "transfer"):
            before = counters["stats"]["unique_graphs"]
            code, _, err = main(stage, run, *given)
            assert code == 0, err
            compiled[value, stage] = counters["stats"]["unique_graphs"] > before
        made[value] = values(output)
    assert list(compiled.values()) == [False] * 3 + [True] * 3
    torch.testing.assert_close(made["true"], made["false"], rtol=1e-3, atol=1e-4)


def test_a_compiled_student_is_tuned_privately(
    tmp_path: Path, main: Callable, without_fusion: None
) -> None:
    run = write_run(tmp_path)
    settings = ("--set=tune.adapter=prompt", "--set=engine.compile=true")
    assert main("warm-start", run, *settings)[0] == 0
    before = counters["stats"]["unique_graphs"]
    code, _, err = main("tune", run, *settings)
    assert code == 0, err
    assert counters["stats"]["unique_graphs"] > before
    assert "micro-batches of" not in err
