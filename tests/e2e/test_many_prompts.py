"""Prompts of several owners, transferred to one target beside each other."""

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


def transfer(
    main: Callable, run: Path, prompts: list[Path], output: Path, *options: str
) -> list[Path]:
    """Transfer prompts in one command; their artifacts."""
    student = next(run.parent.glob("runs/tiny/distill-*/artifact"))
    sources = str(prompts[0])
    if len(prompts) > 1:
        sources = json.dumps([str(prompt) for prompt in prompts])
    code, out, err = main(
        "transfer",
        run,
        f"--set=inputs.student={student}",
        f"--set=inputs.source_prompt={sources}",
        f"--output={output}",
        "--json",
        *options,
    )
    assert code == 0, err
    # A tuned prompt of two steps before random weights has nothing to say.
    assert "says nearly the same of all public texts" in err
    result = json.loads(out)
    if len(prompts) > 1:
        return [Path(path) for path in result["artifacts"]]
    return [Path(result["artifact"])]


def losses_of(artifact: Path) -> list[float]:
    return [line["loss"] for line in read_metric_log(artifact.parent / "metrics.jsonl")]


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_prompt_is_as_if_it_had_been_alone(
    owners: tuple[Path, list[Path]], main: Callable, tmp_path: Path, variant: str
) -> None:
    run, prompts = owners
    options = VARIANTS[variant]
    together = transfer(main, run, prompts, tmp_path / "together", *options)
    alone = []
    for prompt in prompts:
        alone += transfer(main, run, [prompt], tmp_path / "alone", *options)
    names = [path.parent.name for path in together]
    assert names == [path.parent.name for path in alone], "the same signatures"
    for beside, by_itself in zip(together, alone, strict=True):
        made = read_prompt(beside)
        expected = read_prompt(by_itself)
        torch.testing.assert_close(made.embeddings, expected.embeddings, rtol=0, atol=1e-4)
        assert made.manifest.parents == expected.manifest.parents
        statistics = made.manifest.config["public_text"]
        assert statistics == expected.manifest.config["public_text"]
        wanted = {"class_information_nats"}
        if variant == "vocabulary":
            wanted.add("alpha")
        assert set(statistics) == wanted
        assert 0 < statistics["class_information_nats"] < math.log(2)
        effect = made.manifest.config["effect_on_public_text"]
        assert effect["texts"] == 60
        perplexity = effect["perplexity_with_prompt"]
        other = expected.manifest.config["effect_on_public_text"]
        assert perplexity == pytest.approx(other["perplexity_with_prompt"], rel=0.01)
        card = (beside / "README.md").read_text()
        assert f"| effect on public text, perplexity_with_prompt | {perplexity} |" in card
        assert losses_of(beside) == pytest.approx(losses_of(by_itself), rel=1e-4, abs=1e-6)
    assert not torch.equal(read_prompt(together[0]).embeddings, read_prompt(together[1]).embeddings)


def test_prompts_one_after_another_where_memory_is_short(
    owners: tuple[Path, list[Path]], main: Callable, tmp_path: Path
) -> None:
    run, prompts = owners
    beside = transfer(main, run, prompts, tmp_path / "beside")
    apart = transfer(main, run, prompts, tmp_path / "apart", "--set=transfer.prompts_at_once=1")
    assert [path.parent.name for path in beside] == [path.parent.name for path in apart]
    for one, other in zip(beside, apart, strict=True):
        own = read_prompt(one).embeddings
        torch.testing.assert_close(own, read_prompt(other).embeddings, rtol=0, atol=1e-4)


def test_a_table_compares_one_prompt(owners: tuple[Path, list[Path]], main: Callable) -> None:
    run, prompts = owners
    sources = json.dumps([str(prompt) for prompt in prompts])
    code, _, err = main("pipeline", run, f"--set=inputs.source_prompt={sources}")
    assert code == 2
    assert "names 2 prompts, and a table compares one" in err
