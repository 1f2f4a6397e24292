"""Students that were not cut from the target: of another width, with more embeddings, with another tokenizer."""

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
from post_dist.config.sources import Task
from post_dist.models.load import load_tokenizer, load_whole
from post_dist.runtime.distributed import World
from post_dist.stages.transfer.objective import Models, prepare_lesson

CPU = torch.device("cpu")
BY_CLASSES = (
    "--set=transfer.objective=proxy",
    "--set=transfer.scores=classes",
    "--set=evaluate.baselines=[]",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run file, and beside its teacher a smaller relative and a model with a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("others")
    tiny.write_model(folder / "relative", "llama", layers=2, width=16, unused=8)
    tiny.write_model(folder / "stranger", "qwen2", layers=2, width=32, vocabulary=400)
    return tiny.write_run(folder)


def made(run: Path, student: str, *options: str) -> tuple[str, ...]:
    return (
        str(run),
        f"--set=inputs.student={run.parent / student}",
        f"--output={run.parent / student}-runs",
        "--json",
        *options,
    )


def test_a_prompt_goes_from_a_smaller_relative_to_the_target(run: Path, main: Callable) -> None:
    code, out, err = main(
        "pipeline", *made(run, "relative", "--set=evaluate.baselines=[published transfer]")
    )
    assert code == 0, err
    names = [row["name"] for row in json.loads(out)["rows"]]
    assert names == [
        "zero-shot",
        "student + prompt",
        "published transfer",
        "transferred",
        "proxy-tuning",
    ]
    widths = {
        path.parent.name[:5]: read_prompt(path).embeddings.shape[1]
        for path in run.parent.glob("relative-runs/tiny/t*/artifact")
    }
    assert widths == {"tune-": 16, "trans": 32}
    code, _, err = main("transfer", *made(run, "relative", "--set=transfer.trained_share=0.5"))
    assert code == 2
    assert "vectors of width 16 do not fit a target of width 32" in err
    assert not list(run.parent.glob("relative-runs/tiny/transfer-*/checkpoints"))


def test_a_prompt_goes_from_another_tokenizer_by_its_classes(run: Path, main: Callable) -> None:
    code, out, err = main("pipeline", *made(run, "stranger", *BY_CLASSES))
    assert code == 0, err
    assert [row["name"] for row in json.loads(out)["rows"]] == [
        "zero-shot",
        "student + prompt",
        "transferred",
        "proxy-tuning",
    ]
    source, target = (
        read_prompt(next(run.parent.glob(f"stranger-runs/tiny/{stage}-*/artifact")))
        for stage in ("tune", "transfer")
    )
    assert source.manifest.tokenizer != target.manifest.tokenizer
    code, _, err = main("transfer", *made(run, "stranger", "--set=transfer.scores=vocabulary"))
    assert code == 2
    assert "different tokenizers" in err
    code, _, err = main(
        "evaluate",
        *made(
            run,
            "relative",
            *BY_CLASSES,
            f"--set=inputs.source_prompt={run.parent / 'stranger-runs/none'}",
        ),
    )
    assert code == 4, "no such prompt"


def test_each_model_reads_the_public_rows_with_its_own_tokenizer(run: Path) -> None:
    folders = {"student": run.parent / "stranger", "target": run.parent / "teacher"}
    models = Models(*(load_whole(folder, "fp32", CPU) for folder in folders.values()))
    student_words, target_words = (load_tokenizer(folder) for folder in folders.values())
    task = PromptTask("{text} It was", (("bad",), ("good",)), 48, False, "good or bad")
    public = Task(name="toy", visibility="public", path=run.parent / "public.csv")
    texts = [text for text, _ in tiny.sentences(6, 5)]
    world = World(0, 1, 0, "none", CPU)
    prompt_nd = torch.randn(3, 32)
    section = Transfer(objective="proxy", scores="classes")
    words, said = (student_words, target_words), {}
    lesson = prepare_lesson(
        task, prompt_nd, public, (texts, []), models, section, words, world, said
    )
    again = prepare_lesson(
        task, 2 * prompt_nd, public, (texts, []), models, section, words, world, said
    )
    assert (again.source is lesson.source, again.target is lesson.target) == (True, True), (
        "asked once for all prompts"
    )
    assert not torch.equal(again.source_prompted, lesson.source_prompted)
    other = prepare_lesson(
        replace(task, label_words=(("good",), ("bad",))),
        prompt_nd,
        public,
        (texts, []),
        models,
        section,
        words,
        world,
        said,
    )
    torch.testing.assert_close(other.target, lesson.target.flip(1), rtol=1e-5, atol=1e-6)
    for kept, model, words, prompt in (
        (lesson.source, models.student, student_words, None),
        (lesson.source_prompted, models.student, student_words, prompt_nd),
        (lesson.target, models.target, target_words, None),
    ):
        input_ids = words(f"{texts[4]} It was", return_tensors="pt").input_ids
        with torch.no_grad():
            logits = model(input_ids, None, prompt, torch.tensor([input_ids.shape[1] - 1]))[0]
        expected = logits[[words(f" {word}").input_ids[0] for word in ("bad", "good")]]
        torch.testing.assert_close(kept[4], expected, rtol=1e-4, atol=1e-5)
