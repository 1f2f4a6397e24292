"""A task that generates text, through all stages: the loss at every token of the responses, exact matches and ROUGE."""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
import yaml

from post_dist.artifacts.prompt import read_prompt
from post_dist.config.schema import Transfer
from post_dist.config.sources import Task
from post_dist.losses.transfer import published_transfer_loss
from post_dist.models.load import load_tokenizer, load_whole
from post_dist.runtime.distributed import World
from post_dist.runtime.metric_log import read_metric_log
from post_dist.stages.transfer.objective import Models, lesson_losses, prepare_lesson

CPU = torch.device("cpu")
ANSWERS = {0: "a dull and weak film", 1: "a lovely and moving film"}


def write_rows(path: Path, seed: int, count: int) -> None:
    rows = (f"{text},{label},{ANSWERS[label]}\n" for text, label in tiny.sentences(count, seed))
    path.write_text("text,label,answer\n" + "".join(rows))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run file whose private and public tasks ask for a text."""
    folder = tmp_path_factory.mktemp("generation")
    path = tiny.write_run(folder)
    tiny.train_writer(folder / "teacher", ANSWERS)
    write_rows(folder / "private.csv", 1, 200)
    write_rows(folder / "public.csv", 2, 60)
    fields = yaml.safe_load(path.read_text())
    del fields["private_task"]["labels"]
    for task in ("private_task", "public_task"):
        fields[task] |= {"response_column": "answer", "max_response_length": 24}
    fields["distill"] |= {"steps": 100, "learning_rate": 3.0e-3, "checkpoint_every_steps": 100}
    fields["tune"] |= {
        "steps": 80,
        "learning_rate": 0.1,
        "batch_size": 16,
        "num_virtual_tokens": 8,
        "init_text": " plot",
    }
    path.write_text(yaml.safe_dump(fields))
    return path


@pytest.fixture(scope="module")
def table(run: Path, post_dist: Callable) -> dict:
    done = post_dist("pipeline", run, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_table_has_exact_matches_and_rouge(run: Path, table: dict) -> None:
    rows = {row["name"]: row for row in table["rows"]}
    assert list(rows) == [
        "zero-shot",
        "student + prompt",
        "direct transfer",
        "published transfer",
        "transferred",
        "full prompt tuning",
    ]
    print({name: (row["exact_match"], row["rouge_l"]) for name, row in rows.items()})
    assert rows["full prompt tuning"]["rouge_l"] > rows["zero-shot"]["rouge_l"] + 0.2
    assert all(
        0 <= row["exact_match"] <= row["rouge_l"] <= row["rouge_1"] + 1e-9 <= 1 + 1e-9
        for row in rows.values()
    )
    report = (run.parent / "runs/tiny/report.md").read_text()
    assert "| row | exact match % | 95% interval | ROUGE-1 % | ROUGE-L % | n | epsilon |" in report


def test_the_first_loss_of_the_transfer_is_the_paper_s_at_every_token(
    run: Path, table: dict
) -> None:
    """By hand: each row alone, its three constants and the prompted target, the mean over its tokens, the mean over the rows."""
    teacher = run.parent / "teacher"
    student = next(run.parent.glob("runs/tiny/distill-*/artifact"))
    tokenizer, models = (
        load_tokenizer(teacher),
        Models(load_whole(student, "fp32", CPU), load_whole(teacher, "fp32", CPU)),
    )
    source = read_prompt(next(run.parent.glob("runs/tiny/tune-????????/artifact")))
    section = Transfer(steps=1, batch_size=4, alpha=0.3)
    public = Task(
        name="toy", visibility="public", path=run.parent / "public.csv", response_column="answer"
    )
    texts = [text for text, _ in tiny.sentences(4, 7)]
    responses = ["a dull film", "lovely", "weak and moving", "a film"]
    world = World(0, 1, 0, "none", CPU)
    lesson = prepare_lesson(
        source.task,
        source.embeddings,
        public,
        (texts, responses),
        models,
        section,
        (tokenizer, tokenizer),
        world,
        {},
    )
    prompt_nd = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    (loss,) = lesson_losses(models, [lesson], [prompt_nd], [[0, 1, 2, 3]], CPU)
    by_hand = []
    for text, response in zip(texts, responses, strict=True):
        before = tokenizer(f"Review: {text} It was").input_ids
        tokens = torch.tensor(
            [before + tokenizer(f" {response}").input_ids + [tokenizer.eos_token_id]]
        )

        def logits(
            model: torch.nn.Module, prompt: torch.Tensor | None, tokens=tokens, before=before
        ) -> torch.Tensor:
            return model.head(model(tokens, None, prompt))[
                0, len(before) - 1 + (0 if prompt is None else len(prompt)) : -1
            ]

        with torch.no_grad():
            constants = (
                logits(models.student, None),
                logits(models.student, source.embeddings),
                logits(models.target, None),
            )
            by_hand.append(
                published_transfer_loss(
                    *constants, logits(models.target, prompt_nd), alpha=0.3, temperature=2.0
                )
            )
    assert float(loss) == pytest.approx(float(torch.stack(by_hand).mean()), rel=1e-4)


def test_two_prompts_beside_each_other_and_two_ranks_learn_the_same(
    run: Path, table: dict, main: Callable, post_dist: Callable
) -> None:
    student = next(run.parent.glob("runs/tiny/distill-*/artifact"))
    prompt = next(run.parent.glob("runs/tiny/tune-????????/artifact"))
    given = ("transfer", run, f"--set=inputs.student={student}", "--json")
    launcher = (
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        "--master-port=29781",
        "-m",
    )
    done = post_dist(
        *given,
        f"--set=inputs.source_prompt={prompt}",
        f"--output={run.parent / 'two'}",
        launcher=launcher,
    )
    assert done.returncode == 0, done.stderr
    code, _, err = main(
        *given,
        f"--set=inputs.source_prompt=[{prompt}, {prompt}]",
        f"--output={run.parent / 'beside'}",
    )
    assert code == 0, err
    files = [
        next(run.parent.glob(f"{runs}/tiny/transfer-*/metrics.jsonl")) for runs in ("two", "beside")
    ]
    (alone,) = (
        losses
        for path in run.parent.glob("runs/tiny/transfer-*/metrics.jsonl")
        if (losses := [line["loss"] for line in read_metric_log(path)])
        and path.parent.name == files[0].parent.name
    )
    assert len(alone) == 6
    for path in files:
        assert [line["loss"] for line in read_metric_log(path)] == pytest.approx(alone, rel=1e-3)


def test_privately_too(run: Path, table: dict, main: Callable) -> None:
    student = next(run.parent.glob("runs/tiny/distill-*/artifact"))
    private = [
        "privacy.enabled=true",
        "privacy.declared_examples=160",
        "privacy.noise_multiplier=1",
        "tune.steps=3",
    ]
    code, out, err = main(
        "tune",
        run,
        f"--set=inputs.student={student}",
        *(f"--set={field}" for field in private),
        "--json",
    )
    assert code == 0, err
    made = read_prompt(Path(json.loads(out)["artifact"]))
    assert made.task.max_response_length == 24
    assert made.task.label_words == ()
    assert 0 < made.epsilon < math.inf


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("transfer.scores=classes", "transfer.scores: classes is for tasks with classes"),
        ("transfer.alpha=auto", "transfer.alpha: auto is for tasks with classes"),
        ("public_task.response_column=null", "the public task has no responses to learn from"),
        ("tune.class_bias=true", "tune.class_bias is for tasks with classes"),
        (
            "private_task.labels={0: [bad], 1: [good]}",
            "private_task has labels and a response_column",
        ),
    ],
)
def test_what_needs_classes_is_refused(
    run: Path, table: dict, main: Callable, setting: str, said: str
) -> None:
    student = next(run.parent.glob("runs/tiny/distill-*/artifact"))
    prompt = next(run.parent.glob("runs/tiny/tune-????????/artifact"))
    given = [
        f"--set={field}"
        for field in (f"inputs.student={student}", f"inputs.source_prompt={prompt}", setting)
    ]
    code, _, err = main("transfer", run, *given, f"--output={run.parent / 'refused'}")
    assert code == 2
    assert said in err
    assert not list(run.parent.glob("refused/tiny/transfer-*/artifact"))
