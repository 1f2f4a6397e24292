"""A small model that answers, and prompts for it, for tests of `predict` and `export`."""

from collections.abc import Mapping
from pathlib import Path

import tiny
import torch

from post_dist.artifacts import prompt as artifact
from post_dist.artifacts.task import PromptTask
from post_dist.files import fingerprint
from post_dist.models.load import load_tokenizer, tokenizer_fingerprint

TASK = PromptTask(
    "Review: {text} It was", (("bad",), ("good",)), 48, False, "good", label_names=("no", "yes")
)


def write_model(folder: Path, family: str = "llama", seed: int = 0) -> Path:
    """Write a model whose answers depend on the text."""
    tiny.write_model(folder, family, seed=seed)
    tiny.speak_up(folder)
    return folder


def write_prompt(
    folder: Path,
    model: Path,
    task: PromptTask = TASK,
    adapter: artifact.Adapter | None = None,
    scale: float = 1.0,
    parents: Mapping[str, str] | None = None,
) -> Path:
    """Write a prompt that was tuned on the model, or has other parents."""
    torch.manual_seed(0)
    contents = artifact.PromptContents(scale * torch.randn(5, 32), task, None, adapter)
    origin = artifact.Provenance(
        model_name="model",
        tokenizer=tokenizer_fingerprint(load_tokenizer(model)),
        parents=parents or {"model": fingerprint(model)},
        config={},
    )
    artifact.write_prompt(folder, contents, origin, lambda _: None)
    return folder
