"""A task that generates text, through all stages.

The loss is taken at every token of the responses. The table holds exact matches and ROUGE.
"""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from started import run_ranks

from post_dist import load_prompt, load_run
from post_dist.artifacts.prompt import read_prompt
from post_dist.config.schema import Transfer
from post_dist.data.tasks import load_examples
from post_dist.losses.transfer import published_transfer_loss
from post_dist.models.language_model import LanguageModel
from post_dist.models.load import load_tokenizer, load_whole
from post_dist.runtime.distributed import World
from post_dist.runtime.metric_log import read_metric_log
from post_dist.stages.evaluate.metrics import response_metrics
from post_dist.stages.transfer.builder import ObjectiveBuilder, PublicExamples, Tokenizers
from post_dist.stages.transfer.objective import ModelPair
from post_dist.stages.transfer.step_losses import transfer_losses

CPU = torch.device("cpu")
ANSWERS = {0: "a dull and weak film", 1: "a lovely and moving film"}


def write_examples(path: Path, seed: int, count: int) -> None:
    lines = ["text,label,answer\n"]
    for text, label in tiny.sentences(count, seed):
        lines.append(f"{text},{label},{ANSWERS[label]}\n")
    path.write_text("".join(lines))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run file whose private and public tasks ask for a text."""
    folder = tmp_path_factory.mktemp("generation")
    path = tiny.write_run(folder)
    tiny.train_writer(folder / "teacher", ANSWERS)
    write_examples(folder / "private.csv", 1, 200)
    write_examples(folder / "public.csv", 2, 60)
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


def artifact(run: Path, pattern: str) -> Path:
    """The one artifact of a stage in the run's folder."""
    return next(run.parent.glob(f"runs/tiny/{pattern}/artifact"))


@pytest.fixture(scope="module")
def table(run: Path, post_dist: Callable) -> dict:
    done = post_dist("pipeline", run, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def student(run: Path, table: dict) -> Path:
    return artifact(run, "distill-*")


@pytest.fixture(scope="module")
def prompt(run: Path, table: dict) -> Path:
    return artifact(run, "tune-????????")


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
    for row in rows.values():
        assert 0 <= row["exact_match"] <= row["rouge_l"]
        assert row["rouge_l"] <= row["rouge_1"] + 1e-9 <= 1 + 1e-9
    report = (run.parent / "runs/tiny/report.md").read_text()
    assert "| row | exact match % | 95% interval | ROUGE-1 % | ROUGE-L % | n | epsilon |" in report


def test_predictions_are_the_responses_of_the_table(
    run: Path, student: Path, prompt: Path, table: dict
) -> None:
    examples = load_examples(load_run(run).private_task, "test", "private_task")
    found = load_prompt(prompt).predict(examples.texts, student, precision="fp32")
    metrics = response_metrics([each.response for each in found], examples.responses)
    (wanted,) = [row for row in table["rows"] if row["name"] == "student + prompt"]
    assert {name: wanted[name] for name in metrics if name != "interval_95"} == {
        name: value for name, value in metrics.items() if name != "interval_95"
    }


def test_the_first_loss_of_the_transfer_is_the_paper_s_at_every_token(
    run: Path, student: Path, prompt: Path
) -> None:
    """Compute it by hand: each example alone, the mean over its tokens, the mean over examples."""
    teacher = run.parent / "teacher"
    tokenizer = load_tokenizer(teacher)
    models = ModelPair(load_whole(student, "fp32", CPU), load_whole(teacher, "fp32", CPU))
    source = read_prompt(prompt)
    section = Transfer(objective="published", steps=1, batch_size=4, alpha=0.3)
    texts = [text for text, _ in tiny.sentences(4, 7)]
    responses = ["a dull film", "lovely", "weak and moving", "a film"]
    world = World(0, 1, 0, "none", CPU)
    public = PublicExamples(texts, responses)
    builder = ObjectiveBuilder(models, Tokenizers(tokenizer, tokenizer), public, world)
    # The owner may claim more tokens than the public responses have.
    task = replace(source.task, max_response_length=60)
    objective = builder.build(task, source.embeddings, section)
    longest = max(len(tokenizer(f" {response}").input_ids) + 1 for response in responses)
    assert objective.outputs.source.shape == (4, longest, 32)
    prompt_nd = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    (loss,) = transfer_losses(models, [objective], [prompt_nd], [[0, 1, 2, 3]])

    def logits(
        model: LanguageModel, before: list[int], after: list[int], own_nd: torch.Tensor | None
    ) -> torch.Tensor:
        """Logits at the tokens of the response."""
        hidden = model(torch.tensor([before + after]), None, own_nd)
        prompt_length = 0 if own_nd is None else len(own_nd)
        return model.head(hidden)[0, len(before) - 1 + prompt_length : -1]

    by_hand = []
    for text, response in zip(texts, responses, strict=True):
        before = tokenizer(f"Review: {text} It was").input_ids
        after = [*tokenizer(f" {response}").input_ids, tokenizer.eos_token_id]
        with torch.no_grad():
            own_loss = published_transfer_loss(
                logits(models.student, before, after, None),
                logits(models.student, before, after, source.embeddings),
                logits(models.target, before, after, None),
                logits(models.target, before, after, prompt_nd),
                alpha=0.3,
                temperature=2.0,
            )
        by_hand.append(own_loss)
    assert float(loss) == pytest.approx(float(torch.stack(by_hand).mean()), rel=1e-4)


def losses_of(metrics: Path) -> list[float]:
    return [line["loss"] for line in read_metric_log(metrics)]


def test_two_prompts_beside_each_other_and_two_ranks_learn_the_same(
    run: Path, student: Path, prompt: Path, main: Callable
) -> None:
    command = ("transfer", run, f"--set=inputs.student={student}", "--json")
    ranks = run_ranks(
        *command, f"--set=inputs.source_prompt={prompt}", f"--output={run.parent / 'two'}"
    )
    assert [rank.returncode for rank in ranks] == [0, 0], ranks
    code, _, err = main(
        *command,
        f"--set=inputs.source_prompt=[{prompt}, {prompt}]",
        f"--output={run.parent / 'beside'}",
    )
    assert code == 0, err
    on_two_ranks = next(run.parent.glob("two/tiny/transfer-*/metrics.jsonl"))
    beside = next(run.parent.glob("beside/tiny/transfer-*/metrics.jsonl"))
    # The pipeline has made the same transfer alone, in a folder of the same name.
    alone = losses_of(run.parent / "runs/tiny" / on_two_ranks.parent.name / "metrics.jsonl")
    assert len(alone) == 6
    assert losses_of(on_two_ranks) == pytest.approx(alone, rel=1e-3)
    assert losses_of(beside) == pytest.approx(alone, rel=1e-3)


def test_a_private_prompt_that_generates_text(run: Path, student: Path, main: Callable) -> None:
    settings = [
        f"inputs.student={student}",
        "privacy.enabled=true",
        "privacy.declared_examples=160",
        "privacy.noise_multiplier=1",
        "tune.steps=3",
    ]
    options = [f"--set={setting}" for setting in settings]
    code, out, err = main("tune", run, *options, "--json")
    assert code == 0, err
    made = read_prompt(Path(json.loads(out)["artifact"]))
    assert made.task.max_response_length == 24
    assert made.task.label_words == ()
    assert 0 < made.epsilon < math.inf


@pytest.mark.parametrize(
    ("setting", "message"),
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
def test_settings_that_need_classes_are_refused(
    run: Path, student: Path, prompt: Path, main: Callable, setting: str, message: str
) -> None:
    settings = (f"inputs.student={student}", f"inputs.source_prompt={prompt}", setting)
    options = [f"--set={each}" for each in settings]
    code, _, err = main("transfer", run, *options, f"--output={run.parent / 'refused'}")
    assert code == 2
    assert message in err
    assert not list(run.parent.glob("refused/tiny/transfer-*/artifact"))
