"""Artifacts that post_dist 0.1.0 wrote must still be accepted, read and loaded."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from post_dist.artifacts.manifest import read_manifest
from post_dist.artifacts.prompt import read_prompt
from post_dist.artifacts.task import PromptTask
from post_dist.models.load import load_tokenizer, load_whole, tokenizer_fingerprint
from post_dist.verify import verify

FOLDER = Path(__file__).parents[1] / "data" / "artifacts_0_1_0"
KINDS = {
    "student": "student",
    "source_prompt": "soft prompt",
    "transferred_prompt": "soft prompt",
}
CPU = torch.device("cpu")


@pytest.mark.parametrize("name", KINDS)
def test_verify_accepts_it(name: str) -> None:
    found = verify(FOLDER / name)
    # Students of this version say nothing of what they give away.
    assert [found.pop(name, {}) for name in ("given_away", "perplexity")] == [{}, {}]
    wanted = {"ok": True, "kind": KINDS[name], "problems": [], "signature": "not signed"}
    if KINDS[name] == "soft prompt":
        stated = json.loads((FOLDER / name / "privacy.json").read_text())
        wanted |= {field: stated[field] for field in ("epsilon", "delta", "unit")}
    assert found == wanted


@pytest.mark.parametrize("name", ["source_prompt", "transferred_prompt"])
def test_the_prompt_is_read(name: str) -> None:
    prompt = read_prompt(FOLDER / name)
    assert prompt.embeddings.shape == (5, 32)
    assert prompt.task == PromptTask(
        template="Review: {text} It was",
        label_words=(("bad",), ("good",)),
        max_length=48,
        allow_multi_token=False,
        init_text="Predict if the sentiment of this text is positive or negative",
    )
    stated = json.loads((FOLDER / name / "privacy.json").read_text())
    assert prompt.privacy == stated
    assert prompt.epsilon == stated["epsilon"]


def test_the_transferred_prompt_names_its_source_and_student() -> None:
    source = read_prompt(FOLDER / "source_prompt").manifest
    transferred = read_prompt(FOLDER / "transferred_prompt").manifest
    student = read_manifest(FOLDER / "student", "student")
    assert transferred.parents["source prompt"] == source.digest
    assert transferred.parents["model"] == source.parents["model"] == student.digest


@torch.no_grad()
def test_the_student_loads_and_runs_behind_its_prompt() -> None:
    manifest = read_manifest(FOLDER / "student", "student")
    assert tokenizer_fingerprint(load_tokenizer(FOLDER / "student")) == manifest.tokenizer
    student = load_whole(FOLDER / "student", "fp32", CPU)
    prompt = read_prompt(FOLDER / "source_prompt").embeddings
    logits = student(torch.arange(4, 12)[None], prompt=prompt, answer=torch.tensor([7]))
    assert logits.shape == (1, student.vocabulary_size)
    assert torch.isfinite(logits).all()


def test_verify_would_notice_a_changed_file(tmp_path: Path) -> None:
    folder = tmp_path / "prompt"
    shutil.copytree(FOLDER / "source_prompt", folder)
    (folder / "task.json").write_text("{}")
    assert not verify(folder)["ok"]
