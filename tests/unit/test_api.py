"""The Python API without a model: its names, what importing it loads, and its doctests."""

import doctest
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import post_dist
from post_dist import api
from post_dist.artifacts.prompt import PromptContents, Provenance, write_prompt
from post_dist.artifacts.task import PromptTask
from post_dist.config.assets import asset
from post_dist.config.schema import RunConfig
from post_dist.errors import EnvironmentFault, InputError, Interrupted, PostDistError
from post_dist.runtime import ranks, watchdog

DEMO = asset("examples/demo.yaml")

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
    settings = {"privacy": {"enabled": True}}
    parents = {"model": "1" * 64}
    provenance = Provenance("the student", tokenizer="", parents=parents, config=settings)
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


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda config: post_dist.load_run(None), "path is not a string or a path"),
        (lambda config: post_dist.load_run("\0"), "no file has such a name"),
        (lambda config: post_dist.load_run("x" * 300), "File name too long"),
        (lambda config: post_dist.load_run("run.yaml", None), "overrides is not a list"),
        (lambda config: post_dist.load_run("run.yaml", [1]), r"overrides\[0\] is not a string"),
        (lambda config: post_dist.load_run(DEMO, output="\0"), "output: .*embedded null byte"),
        (lambda config: post_dist.distill("run.yaml"), "config is not a run file that `load_run`"),
        (lambda config: post_dist.tune({"name": "x"}), "config is not a run file that `load_run`"),
        (lambda config: post_dist.account("run.yaml"), "plan is not a run file that `load_run`"),
        (lambda config: post_dist.tune(config, resume="Never"), r"'never' \(found 'Never'\)"),
        (lambda config: post_dist.tune(config, resume=None), r"'never' \(found None\)"),
        (lambda config: post_dist.pipeline(config, resume=True), r"'never' \(found True\)"),
        (lambda config: post_dist.settings_for_minutes(config, "5"), "minutes is not a number"),
        (lambda config: post_dist.settings_for_minutes(config, 1e300), "minutes is not less"),
        (lambda config: post_dist.audit_membership(config, shadows="8"), "shadows is not a whole"),
        (lambda config: post_dist.audit_membership(config, rows=True), "rows is not a whole"),
        (lambda config: post_dist.load_prompt("p", keys="key"), "keys is not a list"),
        (lambda config: post_dist.load_prompt("p", keys=[None]), r"keys\[0\] is not a string or"),
    ],
)
def test_an_argument_of_another_kind_is_refused(call: Callable, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call(post_dist.load_run(DEMO))


def test_a_refused_start_leaves_the_process_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the watchdog would end a notebook half an hour later."""
    # Some clusters leave such a set of variables behind.
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(EnvironmentFault, match="RANK are set, but LOCAL_RANK"):
        post_dist.distill(post_dist.load_run(DEMO))
    assert watchdog._Watch.paused
    assert (os.environ["RANK"], os.environ.get("WORLD_SIZE")) == ("0", None)


def test_an_interrupted_start_leaves_the_process_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Otherwise every later call would be refused for the variables of the first."""

    def interrupt(local_rank: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("post_dist.runtime.distributed._use_device", interrupt)
    with pytest.raises(Interrupted):
        post_dist.distill(post_dist.load_run(DEMO))
    assert watchdog._Watch.paused
    assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} & set(os.environ)


def test_one_call_runs_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two calls would share the watchdog, and the network that private data close."""
    config = post_dist.load_run(DEMO)
    begun = threading.Event()
    ends = threading.Event()

    def wait(config: RunConfig) -> None:
        begun.set()
        ends.wait(60)
        raise InputError("the first call ends")

    monkeypatch.setattr(ranks, "join_ranks", wait)
    refusals = []

    def first() -> None:
        try:
            post_dist.distill(config)
        except InputError as error:
            refusals.append(str(error))

    thread = threading.Thread(target=first)
    thread.start()
    begun.wait(60)
    try:
        with pytest.raises(EnvironmentFault, match="another thread of this process runs a stage"):
            post_dist.tune(config)
    finally:
        ends.set()
        thread.join()
    assert refusals == ["the first call ends"]
    with pytest.raises(InputError, match="the first call ends"):
        post_dist.tune(config)


def test_a_plan_and_its_run_file_cost_the_same() -> None:
    from post_dist.privacy.calibration import private_plan

    settings = ["privacy.noise_multiplier=1.5"]
    config = post_dist.load_run(asset("examples/demo.yaml"), settings)
    cost = post_dist.account(config)
    assert cost == post_dist.account(private_plan(config))
    assert cost.noise_multiplier == 1.5
    assert set(cost.cross_checks) == {"rdp", "prv"}
