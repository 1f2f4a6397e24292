"""A LoRA or a head on the large LLM in place of a prompt: on ranks, in tables, and at use."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from e2e.test_head import artifact, predicted_accuracy, write_run
from started import run_ranks

from post_dist.artifacts.prompt import SoftPromptArtifact, read_prompt
from post_dist.runtime.metric_log import read_metric_log

LORA = (
    "--set=transfer.adapter=lora",
    "--set=transfer.lora={r: 2, upper_layers: 2}",
    "--set=transfer.learning_rate=0.01",
    "--set=transfer.trained_share=1",
)


HEAD = ("--set=transfer.adapter=head", "--set=transfer.objective=ensemble")


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory, post_dist: Callable) -> Path:
    """The run file of an owner who has tuned two heads."""
    run = write_run(tmp_path_factory.mktemp("tuned"))
    assert post_dist("warm-start", run).returncode == 0
    for rate in (1, 4):
        settings = ("--set=privacy.enabled=false", f"--set=tune.learning_rate={rate}")
        done = post_dist("tune", run, *settings)
        assert done.returncode == 0, done.stderr
    return run


def heads(run: Path) -> list[Path]:
    return sorted(run.parent.glob("runs/tiny/tune-*/artifact"))


def transferred(output: Path) -> SoftPromptArtifact:
    (folder,) = output.rglob("transfer-*/artifact")
    return read_prompt(folder)


def transfer_command(
    run: Path, sources: list[Path], output: Path, settings: tuple[str, ...] = LORA
) -> tuple[object, ...]:
    listed = json.dumps([str(source) for source in sources]) if len(sources) > 1 else sources[0]
    return (
        "transfer",
        run,
        f"--set=inputs.source_prompt={listed}",
        f"--output={output}",
        *settings,
    )


def test_a_lora_carries_a_private_head_to_the_large_llm(tmp_path: Path, main: Callable) -> None:
    run = write_run(tmp_path)
    steps = "--set=transfer.steps=40"
    assert main("check", run, *LORA, steps)[0] == 0
    code, out, err = main("pipeline", run, "--json", *LORA, steps)
    assert code == 0, err
    rows = {row["name"]: row for row in json.loads(out)["rows"]}

    found = read_prompt(artifact(tmp_path, "transfer"))
    # Only the upper two of the four layers are changed.
    assert [layer.split(".", 3)[2] for layer in found.adapter.layers] == ["2", "2", "3", "3"]
    assert all(factor.any() for factor in found.adapter.factors.values())
    source = read_prompt(artifact(tmp_path, "tune"))
    assert found.privacy == source.privacy
    # The prompt in front is the public one, as it was.
    assert torch.equal(found.embeddings, source.embeddings)
    losses = [
        line["loss"]
        for line in read_metric_log(artifact(tmp_path, "transfer").parent / "metrics.jsonl")
    ]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    code, out, _ = main("verify", artifact(tmp_path, "transfer"), "--json")
    assert code == 0, out
    card = (artifact(tmp_path, "transfer") / "README.md").read_text()
    assert "LoRA behind a soft prompt" in card
    assert "head_layers" not in card
    assert "learning_rate" in card

    # Predictions with the LoRA are those of the table.
    accuracy = predicted_accuracy(run, artifact(tmp_path, "transfer"), tmp_path / "teacher")
    assert accuracy == rows["transferred"]["accuracy_micro"]
    manifest = json.loads((artifact(tmp_path, "transfer") / "post_dist.json").read_text())
    effect = manifest["config"]["effect_on_public_text"]
    assert effect["perplexity_with_prompt"] != effect["perplexity_without_prompt"]


@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_ranks_that_were_stopped_train_the_lora_of_one_process(
    tuned: Path, tmp_path: Path, main: Callable, checkpointing: str
) -> None:
    source = heads(tuned)[:1]
    code, _, err = main(*transfer_command(tuned, source, tmp_path / "one"))
    assert code == 0, err

    command = (
        *transfer_command(tuned, source, tmp_path / "two"),
        f"--set=engine.activation_checkpointing={checkpointing}",
    )
    stopped = run_ranks(*command, preparations=("stopped at its third step", "nothing"))
    assert [rank.returncode for rank in stopped] == [6, 6], stopped[0].stderr
    resumed = run_ranks(*command, preparations=("nothing", "nothing"))
    assert [rank.returncode for rank in resumed] == [0, 0], resumed[0].stderr
    assert "resuming from step 3" in resumed[0].stderr

    one = transferred(tmp_path / "one").adapter
    two = transferred(tmp_path / "two").adapter
    for name, factor in one.factors.items():
        assert torch.allclose(factor, two.factors[name], atol=1e-5), name


def test_each_lora_is_as_if_it_had_been_alone(tuned: Path, tmp_path: Path, main: Callable) -> None:
    assert len(heads(tuned)) == 2
    code, out, err = main(*transfer_command(tuned, heads(tuned), tmp_path / "both"), "--json")
    assert code == 0, err
    both = [read_prompt(Path(folder)) for folder in json.loads(out)["artifacts"]]
    for number, source in enumerate(heads(tuned)):
        output = tmp_path / f"alone {number}"
        assert main(*transfer_command(tuned, [source], output))[0] == 0
        alone = transferred(output)
        for name, factor in alone.adapter.factors.items():
            assert torch.equal(factor, both[number].adapter.factors[name]), name
    first, second = (prompt.adapter.factors for prompt in both)
    assert not any(torch.equal(first[name], second[name]) for name in first if "lora_B" in name)


def test_a_head_carries_a_private_head_to_the_large_llm(tmp_path: Path, main: Callable) -> None:
    run = write_run(tmp_path)
    assert main("check", run, *HEAD)[0] == 0
    code, out, err = main("pipeline", run, "--json", *HEAD)
    assert code == 0, err
    rows = {row["name"]: row for row in json.loads(out)["rows"]}

    found = read_prompt(artifact(tmp_path, "transfer"))
    source = read_prompt(artifact(tmp_path, "tune"))
    assert found.adapter.trained
    assert found.privacy == source.privacy
    assert rows["transferred"]["epsilon"] == source.epsilon
    # The prompt in front is the public one, as it was.
    assert torch.equal(found.embeddings, source.embeddings)
    code, out, _ = main("verify", artifact(tmp_path, "transfer"), "--json")
    assert code == 0, out
    card = (artifact(tmp_path, "transfer") / "README.md").read_text()
    assert "linear head behind a soft prompt" in card
    assert "head_layers" in card
    assert "learning_rate" not in card

    # Predictions with the head are those of the table.
    accuracy = predicted_accuracy(run, artifact(tmp_path, "transfer"), tmp_path / "teacher")
    assert accuracy == rows["transferred"]["accuracy_micro"]
    manifest = json.loads((artifact(tmp_path, "transfer") / "post_dist.json").read_text())
    told = manifest["config"]["public_text"]
    assert told["held_out_kl_nats"] < told["kl_without_head_nats"]
    # A head writes no text.
    effect = manifest["config"]["effect_on_public_text"]
    assert effect["texts"] == 60
    assert not any("perplexity" in name for name in effect)


def test_ranks_fit_the_head_of_one_process(tuned: Path, tmp_path: Path, main: Callable) -> None:
    source = heads(tuned)[:1]
    assert main(*transfer_command(tuned, source, tmp_path / "one", HEAD))[0] == 0
    command = transfer_command(tuned, source, tmp_path / "two", HEAD)
    made = run_ranks(*command, preparations=("nothing", "nothing"))
    assert [rank.returncode for rank in made] == [0, 0], made[0].stderr
    one = transferred(tmp_path / "one").adapter
    two = transferred(tmp_path / "two").adapter
    assert one.above == two.above
    torch.testing.assert_close(one.weight, two.weight, atol=1e-3, rtol=1e-3)


def test_a_head_needs_some_public_texts(tuned: Path, tmp_path: Path, main: Callable) -> None:
    few = (*HEAD, "--set=public_task.max_rows=7")
    code, _, err = main(*transfer_command(tuned, heads(tuned)[:1], tmp_path / "few", few))
    assert code == 2
    assert "head needs 8 public texts, and public_task has 7" in err
    # A short file shows only when it is read.
    short = tmp_path / "short.csv"
    short.write_text("\n".join((tuned.parent / "public.csv").read_text().splitlines()[:4]) + "\n")
    given = (*HEAD, f"--set=public_task.path={short}")
    code, _, err = main(*transfer_command(tuned, heads(tuned)[:1], tmp_path / "few", given))
    assert code == 2
    assert "public_task has 3" in err
    enough = (*HEAD, "--set=public_task.max_rows=8")
    code, _, err = main(*transfer_command(tuned, heads(tuned)[:1], tmp_path / "enough", enough))
    assert code == 0, err


def test_heads_behind_one_prompt_share_its_states(
    tuned: Path, tmp_path: Path, main: Callable
) -> None:
    # The run file's objective subtracts what the student says without the prompt.
    settings = ("--set=transfer.adapter=head", "--set=transfer.head_layers=1")
    both = transfer_command(tuned, heads(tuned), tmp_path / "both", settings)
    code, out, err = main(*both, "--json")
    assert code == 0, err
    # Student and target each read the public text once behind the prompt.
    assert err.count("student + prompt ") == 1
    assert err.count("target + prompt ") == 1
    made = [read_prompt(Path(folder)).adapter for folder in json.loads(out)["artifacts"]]
    for number, source in enumerate(heads(tuned)):
        output = tmp_path / f"alone {number}"
        assert main(*transfer_command(tuned, [source], output, settings))[0] == 0
        assert torch.equal(transferred(output).adapter.weight, made[number].weight)
    assert not torch.equal(made[0].weight, made[1].weight)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("adapter=lora", "lora.upper_layers=9"), "transfer.lora.upper_layers is 9"),
        (("adapter=lora", "lora.target_modules=[c_attn]"), "choose from down_proj, gate_proj"),
        (("adapter=head", "objective=published"), "adapter: head needs objective: proxy or"),
        (("adapter=head", "scores=vocabulary"), "adapter: head needs objective: proxy or"),
        (("adapter=head", "head_layers=0"), "transfer.head_layers"),
        (("lora.r=2",), "lora holds the settings of adapter: lora"),
    ],
)
def test_settings_that_do_not_suit_the_large_llm_are_refused(
    tuned: Path, main: Callable, settings: tuple[str, ...], said: str
) -> None:
    code, out, err = main("check", tuned, *(f"--set=transfer.{each}" for each in settings))
    assert code == 2, out
    assert said in out + err
