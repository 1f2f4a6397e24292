"""The Python API without a model: its names, what importing it loads, and its doctests."""

import doctest
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import post_dist
from post_dist import api
from post_dist.artifacts.prompt import PromptContents, Provenance, write_prompt
from post_dist.artifacts.task import PromptTask
from post_dist.config.assets import asset
from post_dist.errors import PostDistError

NAMES = [
    "CorpusResult",
    "EvaluationResult",
    "PrivacyCost",
    "PromptResult",
    "PublicPromptResult",
    "SignalsResult",
    "StudentResult",
    "TimedSettings",
    "TransferResult",
    "account",
    "audit_membership",
    "distill",
    "evaluate",
    "load_prompt",
    "load_run",
    "pipeline",
    "settings_for_minutes",
    "tokenize_corpus",
    "transfer",
    "tune",
    "warm_start",
    "write_signals",
]


def test_the_package_exports_the_api_and_loads_nothing_for_it() -> None:
    program = (
        "import sys, post_dist; names = dir(post_dist); "
        "heavy = {'torch', 'transformers', 'deepspeed', 'pydantic', 'numpy'} & set(sys.modules); "
        "print(sorted(heavy), [name for name in names if name in post_dist.__all__])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == f"[] {NAMES}"


STATEMENT = Path(__file__).parents[1] / "data/artifacts_0_1_0/source_prompt/privacy.json"


@pytest.mark.parametrize("name", NAMES)
def test_each_name_is_the_api_s_and_documented(name: str) -> None:
    found = getattr(post_dist, name)
    assert found is getattr(api, name)
    assert found.__doc__


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'distil'"):
        _ = post_dist.distil


def test_the_examples_in_docstrings_hold() -> None:
    found = doctest.testmod(api, optionflags=doctest.ELLIPSIS)
    assert found.attempted >= 8
    assert found.failed == 0


def test_a_prompt_is_read_with_its_task_and_its_claim(tmp_path: Path) -> None:
    embeddings_nd = torch.randn(3, 8)
    task = PromptTask("{text} It was", (("bad",), ("good",)), 32, False, "Review")
    privacy = json.loads(STATEMENT.read_text())
    contents = PromptContents(embeddings_nd, task, privacy)
    provenance = Provenance("the student", tokenizer="", parents={"model": "1" * 64}, config={})
    write_prompt(tmp_path / "prompt", contents, provenance, lambda folder: None)
    prompt = post_dist.load_prompt(str(tmp_path / "prompt"))
    assert torch.equal(prompt.embeddings, embeddings_nd)
    assert (prompt.task, prompt.epsilon) == (task, privacy["epsilon"])
    # A false claim is refused, as in `verify`.
    false = PromptContents(embeddings_nd, task, privacy | {"epsilon": 0.1})
    write_prompt(tmp_path / "false", false, provenance, lambda folder: None)
    with pytest.raises(PostDistError, match=r"privacy\.json"):
        post_dist.load_prompt(tmp_path / "false")


def test_a_stage_says_what_is_missing(tmp_path: Path) -> None:
    run = tmp_path / "run.yaml"
    run.write_text("name: x\n")
    with pytest.raises(PostDistError, match="lacks the sections teacher, student, corpus"):
        post_dist.distill(post_dist.load_run(run))


def test_a_plan_and_its_run_file_cost_the_same() -> None:
    from post_dist.privacy.calibration import private_plan

    settings = ["privacy.noise_multiplier=1.5"]
    config = post_dist.load_run(asset("examples/demo.yaml"), settings)
    cost = post_dist.account(config)
    assert cost == post_dist.account(private_plan(config))
    assert cost.noise_multiplier == 1.5
    assert set(cost.cross_checks) == {"rdp", "prv"}
