"""Prompts of several owners, carried to one resident target beside each other."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch

from post_dist.artifacts.prompt import read_prompt
from post_dist.runtime.metric_log import read_metric_log

VARIANTS = {
    "classes": ["--set=transfer.objective=proxy", "--set=transfer.scores=classes"],
    "vocabulary": ["--set=transfer.objective=published", "--set=transfer.alpha=auto"],
}


@pytest.fixture(scope="module")
def owners(
    tmp_path_factory: pytest.TempPathFactory, post_dist: Callable
) -> tuple[Path, list[Path]]:
    """A run file, and the prompts of two owners with templates of their own."""
    run = tiny.write_run(tmp_path_factory.mktemp("owners"))
    assert post_dist("distill", run).returncode == 0
    prompts = []
    for template in ("{text} It was", "{text} All in all a film that is"):
        tuned = post_dist("tune", run, f"--set=private_task.template='{template}'", "--json")
        assert tuned.returncode == 0, tuned.stderr
        prompts.append(Path(json.loads(tuned.stdout)["artifact"]))
    return run, prompts


def carried(
    main: Callable, run: Path, prompts: list[Path], output: Path, *options: str
) -> list[Path]:
    student = next(run.parent.glob("runs/tiny/distill-*/artifact"))
    given = json.dumps([str(prompt) for prompt in prompts]) if len(prompts) > 1 else prompts[0]
    code, said, errors = main(
        "transfer",
        run,
        f"--set=inputs.student={student}",
        f"--set=inputs.source_prompt={given}",
        f"--output={output}",
        "--json",
        *options,
    )
    assert code == 0, errors
    result = json.loads(said)
    return [Path(path) for path in result.get("artifacts", [result.get("artifact")])]


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_prompt_is_as_if_it_had_been_alone(
    owners: tuple[Path, list[Path]], main: Callable, tmp_path: Path, variant: str
) -> None:
    run, prompts = owners
    together = carried(main, run, prompts, tmp_path / "together", *VARIANTS[variant])
    alone = [
        carried(main, run, [prompt], tmp_path / "alone", *VARIANTS[variant])[0]
        for prompt in prompts
    ]
    assert [path.parent.name for path in together] == [path.parent.name for path in alone], (
        "the same runs by their signatures"
    )
    for beside, by_itself in zip(together, alone, strict=True):
        made, expected = read_prompt(beside), read_prompt(by_itself)
        torch.testing.assert_close(made.embeddings, expected.embeddings, rtol=0, atol=1e-4)
        assert made.manifest.parents == expected.manifest.parents
        told = made.manifest.config["public_text"]
        assert told == expected.manifest.config["public_text"]
        assert set(told) == {"class_information_nats"} | (
            {"alpha"} if variant == "vocabulary" else set()
        )
        assert 0 < told["class_information_nats"] < math.log(2)
        losses = [
            [line["loss"] for line in read_metric_log(path.parent / "metrics.jsonl")]
            for path in (beside, by_itself)
        ]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4, abs=1e-6)
    assert not torch.equal(read_prompt(together[0]).embeddings, read_prompt(together[1]).embeddings)


def test_one_after_another_where_memory_is_short(
    owners: tuple[Path, list[Path]], main: Callable, tmp_path: Path
) -> None:
    run, prompts = owners
    beside = carried(main, run, prompts, tmp_path / "beside")
    apart = carried(main, run, prompts, tmp_path / "apart", "--set=transfer.prompts_at_once=1")
    assert [path.parent.name for path in beside] == [path.parent.name for path in apart]
    for one, other in zip(beside, apart, strict=True):
        torch.testing.assert_close(
            read_prompt(one).embeddings, read_prompt(other).embeddings, rtol=0, atol=1e-4
        )


def test_a_table_is_of_one_prompt(owners: tuple[Path, list[Path]], main: Callable) -> None:
    run, prompts = owners
    code, _, errors = main(
        "pipeline",
        run,
        "--set=inputs.source_prompt=" + json.dumps([str(prompt) for prompt in prompts]),
    )
    assert code == 2
    assert "names 2 prompts, and a table is of one" in errors
