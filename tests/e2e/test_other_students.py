"""Students that were not cut from the target: another width, more embeddings, another tokenizer."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch

from post_dist.artifacts.prompt import read_prompt
from post_dist.artifacts.task import PromptTask
from post_dist.config.schema import Transfer
from post_dist.models.load import load_tokenizer, load_whole
from post_dist.runtime.distributed import World
from post_dist.stages.transfer.builder import ObjectiveBuilder, PublicExamples, Tokenizers
from post_dist.stages.transfer.objective import ModelPair

CPU = torch.device("cpu")
BY_CLASSES = (
    "--set=transfer.objective=proxy",
    "--set=transfer.scores=classes",
    "--set=evaluate.baselines=[]",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run file, a smaller relative of its teacher, and a model with a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("others")
    tiny.write_model(folder / "relative", "llama", layers=2, width=16, unused=8)
    tiny.write_model(folder / "stranger", "qwen2", layers=2, width=32, vocabulary=400)
    return tiny.write_run(folder)


def with_student(run: Path, student: str, *options: str) -> tuple[str, ...]:
    """Arguments of a command that uses another student, with an output folder of its own."""
    return (
        str(run),
        f"--set=inputs.student={run.parent / student}",
        "--trust-model",
        f"--output={run.parent / student}-runs",
        "--json",
        *options,
    )


def test_a_prompt_goes_from_a_smaller_relative_to_the_target(run: Path, main: Callable) -> None:
    code, out, err = main(
        "pipeline", *with_student(run, "relative", "--set=evaluate.baselines=[published transfer]")
    )
    assert code == 0, err
    names = [row["name"] for row in json.loads(out)["rows"]]
    assert names == [
        "zero-shot",
        "majority class",
        "TF-IDF + logistic regression",
        "student + prompt",
        "published transfer",
        "transferred",
        "proxy-tuning",
    ]
    runs = run.parent / "relative-runs/tiny"
    for stage, width in (("tune", 16), ("transfer", 32)):
        for artifact in runs.glob(f"{stage}-*/artifact"):
            assert read_prompt(artifact).embeddings.shape[1] == width
    code, _, err = main(
        "transfer", *with_student(run, "relative", "--set=transfer.trained_share=0.5")
    )
    assert code == 2
    assert "vectors of width 16 do not fit a target of width 32" in err
    assert not list(run.parent.glob("relative-runs/tiny/transfer-*/checkpoints"))


def test_a_prompt_goes_from_another_tokenizer_by_its_classes(run: Path, main: Callable) -> None:
    code, out, err = main("pipeline", *with_student(run, "stranger", *BY_CLASSES))
    assert code == 0, err
    assert [row["name"] for row in json.loads(out)["rows"]] == [
        "zero-shot",
        "majority class",
        "TF-IDF + logistic regression",
        "student + prompt",
        "transferred",
        "proxy-tuning",
    ]
    runs = run.parent / "stranger-runs/tiny"
    source = read_prompt(next(runs.glob("tune-*/artifact")))
    target = read_prompt(next(runs.glob("transfer-*/artifact")))
    assert source.manifest.tokenizer != target.manifest.tokenizer
    code, _, err = main(
        "transfer", *with_student(run, "stranger", "--set=transfer.scores=vocabulary")
    )
    assert code == 2
    assert "different tokenizers" in err
    missing = run.parent / "stranger-runs/none"
    options = (*BY_CLASSES, f"--set=inputs.source_prompt={missing}")
    code, _, err = main("evaluate", *with_student(run, "relative", *options))
    assert code == 4, "no such prompt"


def test_each_model_reads_the_public_examples_with_its_own_tokenizer(run: Path) -> None:
    student_folder = run.parent / "stranger"
    target_folder = run.parent / "teacher"
    models = ModelPair(
        load_whole(student_folder, "fp32", CPU), load_whole(target_folder, "fp32", CPU)
    )
    tokenizers = Tokenizers(load_tokenizer(student_folder), load_tokenizer(target_folder))
    texts = [text for text, _ in tiny.sentences(6, 5)]
    world = World(0, 1, 0, "none", CPU)
    builder = ObjectiveBuilder(models, tokenizers, PublicExamples(texts, []), world)

    task = PromptTask("{text} It was", (("bad",), ("good",)), 48, False, "good or bad")
    prompt_nd = torch.randn(3, 32)
    section = Transfer(objective="proxy", scores="classes")
    objective = builder.build(task, prompt_nd, section)
    outputs = objective.outputs

    biased = replace(task, init_text="another", class_biases=(1.0, -1.0))
    second = builder.build(biased, 2 * prompt_nd, section)
    again = second.outputs
    assert again.source is outputs.source, "computed once for all prompts"
    assert again.target is outputs.target
    assert second.examples is objective.examples, "and encoded once"
    longer = builder.build(replace(task, template="A {text} It was"), prompt_nd, section)
    assert longer.examples != objective.examples
    assert not torch.equal(again.source_prompted, outputs.source_prompted)

    swapped = replace(task, label_words=(("good",), ("bad",)))
    other = builder.build(swapped, prompt_nd, section).outputs
    torch.testing.assert_close(other.target, outputs.target.flip(1), rtol=1e-5, atol=1e-6)

    for stored, model, tokenizer, prompt in (
        (outputs.source, models.student, tokenizers.student, None),
        (outputs.source_prompted, models.student, tokenizers.student, prompt_nd),
        (outputs.target, models.target, tokenizers.target, None),
    ):
        input_ids = tokenizer(f"{texts[4]} It was", return_tensors="pt").input_ids
        last = torch.tensor([input_ids.shape[1] - 1])
        with torch.no_grad():
            logits = model(input_ids, None, prompt, last)[0]
        label_tokens = [tokenizer(f" {word}").input_ids[0] for word in ("bad", "good")]
        torch.testing.assert_close(stored[4], logits[label_tokens], rtol=1e-4, atol=1e-5)
