"""A head that is fitted on the large LLM: it finds layers, scores and the end of its search."""

from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from objectives import TASK, objective_of

from post_dist.artifacts.head import LinearHead
from post_dist.config.schema import Transfer
from post_dist.data.task_reader import TaskReader
from post_dist.losses.divergence import softened_kl
from post_dist.models.answers import OutputsNotFinite
from post_dist.models.batch_inference import InferenceRun
from post_dist.models.headed import headed_scores
from post_dist.models.load import load_whole
from post_dist.models.tuning_task import AnswerStates, TuningTask
from post_dist.runtime.distributed import World
from post_dist.stages.transfer import fitted_head
from post_dist.stages.transfer.fitted_head import FittedHead, fit_head
from post_dist.stages.transfer.objective import FixedOutputs, TransferObjective
from post_dist.stages.transfer.public_reading import PromptedStates, PublicReading

ONE_RANK = World(0, 1, 0, "none", torch.device("cpu"))
SECTION = Transfer(adapter="head", head_layers=1, objective="ensemble", batch_size=16)


def reading_of(folder: Path, words: tuple[str, ...] = ("bad", "good")) -> PublicReading:
    """A target of four layers that reads 80 public texts of a task with these label words."""
    tiny.write_model(folder, "llama")
    tiny.speak_up(folder)
    target = load_whole(folder, "fp32", torch.device("cpu"))
    task = replace(TASK, label_words=tuple((word,) for word in words))
    objective = objective_of(folder, target, task)
    return PublicReading("target", target, objective.reader, objective.examples, SECTION, ONE_RANK)


@pytest.fixture
def reading(tmp_path: Path) -> PublicReading:
    return reading_of(tmp_path / "model")


def prompt() -> torch.Tensor:
    return 0.5 * torch.randn(5, 32, generator=torch.Generator().manual_seed(1))


def planted_head(reading: PublicReading, above: int, size: float = 5) -> LinearHead:
    """A head below the given number of layers whose scores differ from text to text."""
    layers = [len(reading.model.layers) - 1 - above]
    classes = reading.reader.num_classes
    head = LinearHead.untrained(reading.states(prompt(), layers), classes, above)
    weight = torch.randn(classes, 32, generator=torch.Generator().manual_seed(2))
    return head.with_values(size * weight, torch.linspace(0.3, -0.3, classes))


def scores_with(reading: PublicReading, head: LinearHead) -> torch.Tensor:
    layers = head.layers(32, len(reading.model.layers))
    return reading.headed_scores(reading.states(prompt(), layers), head)


def objective_with(reading: PublicReading, wanted_NC: torch.Tensor) -> TransferObjective:
    """The objective of which these are the wanted scores."""
    target_NC = reading.outputs(None, "target")
    return TransferObjective(
        section=reading.section,
        reader=reading.reader,
        examples=reading.examples,
        outputs=FixedOutputs(None, wanted_NC - target_NC, target_NC),
        offsets=torch.zeros(1),
        statistics={},
    )


@pytest.mark.parametrize("above", [0, 1, 3])
@pytest.mark.parametrize("words", [("bad", "good"), ("bad", "good", "film")])
def test_a_head_that_was_planted_is_found_with_its_layer(
    tmp_path: Path, words: tuple[str, ...], above: int
) -> None:
    reading = reading_of(tmp_path / "model", words)
    wanted_NC = scores_with(reading, planted_head(reading, above))
    fitted = fit_head(reading, objective_with(reading, wanted_NC), prompt(), PromptedStates())
    assert fitted.head.above == above == fitted.statistics["layers_above_head"]
    told = fitted.statistics
    assert told["held_out_kl_nats"] < 0.1 * told["kl_without_head_nats"]
    # The scores are those of the head, as an evaluation computes them.
    run = InferenceRun(16, ONE_RANK, "")
    evaluated = headed_scores(
        reading.model, reading.examples, reading.reader, prompt(), fitted.head, run
    )
    torch.testing.assert_close(fitted.scores, evaluated)
    assert (fitted.scores.argmax(dim=1) == wanted_NC.argmax(dim=1)).float().mean() > 0.95


def test_scores_that_no_state_explains_leave_the_head_small(
    reading: PublicReading, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    noise_NC = 3 * torch.randn(80, 2, generator=torch.Generator().manual_seed(3))
    states = PromptedStates()
    planted = scores_with(reading, planted_head(reading, 1))
    explained = fit_head(reading, objective_with(reading, planted), prompt(), states)
    assert "more public text" not in caplog.text
    fitted = fit_head(reading, objective_with(reading, noise_NC), prompt(), states)
    assert fitted.head.weight.norm() < 0.5 * explained.head.weight.norm()
    statistics = fitted.statistics
    assert statistics["held_out_kl_nats"] < 1.05 * statistics["kl_without_head_nats"]
    assert "of that divergence; give it more public text" in caplog.text


def test_both_divergences_are_of_held_out_texts(reading: PublicReading) -> None:
    # Only texts that the head is fitted to differ from what the label words say.
    held_out = fitted_head._is_held_out(80)
    base_NC = reading.headed_scores(reading.states(prompt(), [3]))
    wanted_NC = base_NC + (~held_out)[:, None] * torch.tensor([2.0, -2.0])
    fitted = fit_head(reading, objective_with(reading, wanted_NC), prompt(), PromptedStates())
    assert fitted.statistics["kl_without_head_nats"] == pytest.approx(0, abs=1e-6)
    assert fitted.statistics["held_out_kl_nats"] > 0.05


@pytest.mark.parametrize("period", [2, 3, 4])
def test_texts_that_alternate_are_all_held_out_and_sampled(period: int) -> None:
    kinds = torch.arange(1024) % period
    held_out = fitted_head._is_held_out(1024)
    assert int(held_out.sum()) == 256
    drawn = fitted_head._drawn(1024)[: fitted_head.TEXTS_AT_ALL_LAYERS]
    for chosen in (kinds[held_out], kinds[~held_out], kinds[drawn]):
        assert chosen.bincount(minlength=period).min() > 0.8 * len(chosen) / period


def test_the_divergence_is_that_of_the_trained_transfer() -> None:
    generator = torch.Generator().manual_seed(0)
    base, wanted, added = (torch.randn(9, 3, generator=generator) for _ in range(3))
    found = fitted_head._Scores(base, wanted, 2.0).divergence(added.double())
    expected = softened_kl(wanted, base + added, 2.0) / 2.0**2
    torch.testing.assert_close(found.float(), expected)


def test_private_tuning_reads_the_layers_of_a_head_below_the_last_ones(
    reading: PublicReading,
) -> None:
    head = planted_head(reading, 2)
    task = TuningTask(
        reading.model,
        reading.reader,
        reading.examples,
        torch.zeros(80, dtype=torch.long),
        prompt(),
        adapter=head,
    )
    chosen = [7, 3]
    batch = reading.reader.collate([reading.examples[row] for row in chosen])
    hidden, of_words = AnswerStates(task)(batch)
    torch.testing.assert_close(hidden, reading.states(prompt(), [1], chosen))
    last = reading.headed_scores(reading.states(prompt(), [3], chosen))
    torch.testing.assert_close(of_words, last)


def test_states_of_other_texts_tasks_and_models_are_other_states(reading: PublicReading) -> None:
    kept = PromptedStates()
    whole = kept.of(reading, prompt(), [1])
    assert torch.equal(kept.of(reading, prompt(), [1], [5, 2]), whole[[5, 2]])
    task = replace(reading.reader.task, template="Film: {text} It is")
    reader = TaskReader(
        task,
        reading.reader.tokenizer,
        masked=False,
        vocabulary=reading.model.vocabulary_size,
    )
    texts = [text for text, _ in tiny.sentences(80, 2)]
    other = replace(reading, reader=reader, examples=reader.encode(texts))
    assert not torch.allclose(kept.of(other, prompt(), [1]), whole)
    assert kept.of(reading, prompt(), [1]) is whole
    # The prompt of the student may be another one.
    student = replace(reading, name="student")
    kept.of(student, 2 * prompt(), [1])
    assert kept.of(reading, prompt(), [1]) is whole
    kept.forget()
    assert kept.of(reading, prompt(), [1]) is not whole


def test_more_layers_than_the_model_has_are_all_that_it_has(reading: PublicReading) -> None:
    deep = replace(reading, section=SECTION.model_copy(update={"head_layers": 9}))
    wanted_NC = scores_with(reading, planted_head(reading, 2))
    fitted = fit_head(deep, objective_with(deep, wanted_NC), prompt(), PromptedStates())
    assert fitted.head.depth(32) == 4
    assert fitted.head.above == 0


def test_the_layers_are_chosen_on_some_of_the_texts(
    reading: PublicReading, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []
    states = PublicReading.states

    def counted(self: PublicReading, *arguments: object) -> torch.Tensor:
        found = states(self, *arguments)
        read.append(found.shape)
        return found

    wanted_NC = scores_with(reading, planted_head(reading, 1))
    objective = objective_with(reading, wanted_NC)
    monkeypatch.setattr(PublicReading, "states", counted)
    kept = PromptedStates()

    def fit(of: TransferObjective, prompt_nd: torch.Tensor) -> FittedHead:
        return fit_head(reading, of, prompt_nd, kept)

    # Few texts are read once, at all layers.
    fit_head(reading, objective, prompt(), PromptedStates())
    assert read == [(80, 4 * 32)]
    read.clear()
    monkeypatch.setattr(fitted_head, "TEXTS_AT_ALL_LAYERS", 64)
    first = fit(objective, prompt())
    # Most of the texts at four layers; then all of them, at the head's layer and at the last one.
    assert read == [(64, 4 * 32), (80, 2 * 32)]
    assert first.head.above == 1
    # Another head behind the same prompt runs no layer, and is what it would have been alone.
    other = objective_with(reading, scores_with(reading, planted_head(reading, 1, size=4)))
    read.clear()
    second = fit(other, prompt())
    assert read == []
    assert not torch.equal(second.head.weight, first.head.weight)
    alone = fit_head(reading, other, prompt(), PromptedStates())
    assert torch.equal(second.head.weight, alone.head.weight)
    # Another prompt has other states.
    read.clear()
    fit(objective, 2 * prompt())
    assert len(read) == 2


def test_states_that_overflow_are_refused(reading: PublicReading) -> None:
    objective = objective_with(reading, torch.zeros(80, 2))
    with pytest.raises(OutputsNotFinite):
        fit_head(reading, objective, torch.full((5, 32), float("inf")), PromptedStates())
