"""A head that is fitted on the large LLM: it finds layers, scores and the end of its search."""

from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from objectives import objective_of

from post_dist.artifacts.head import LinearHead
from post_dist.config.schema import Transfer
from post_dist.models.answers import OutputsNotFinite
from post_dist.models.load import load_whole
from post_dist.runtime.distributed import World
from post_dist.stages.transfer import fitted_head
from post_dist.stages.transfer.fitted_head import FittedHead, fit_head
from post_dist.stages.transfer.objective import FixedOutputs, TransferObjective
from post_dist.stages.transfer.public_reading import PromptedStates, PublicReading

ONE_RANK = World(0, 1, 0, "none", torch.device("cpu"))
SECTION = Transfer(adapter="head", head_layers=1, objective="ensemble", batch_size=16)


@pytest.fixture
def reading(tmp_path: Path) -> PublicReading:
    """A target of four layers that reads 80 public texts."""
    tiny.write_model(tmp_path / "model", "llama")
    tiny.speak_up(tmp_path / "model")
    target = load_whole(tmp_path / "model", "fp32", torch.device("cpu"))
    objective = objective_of(tmp_path / "model", target)
    return PublicReading("target", target, objective.reader, objective.examples, SECTION, ONE_RANK)


def prompt() -> torch.Tensor:
    return 0.5 * torch.randn(5, 32, generator=torch.Generator().manual_seed(1))


def planted_head(reading: PublicReading, above: int, size: float = 5) -> LinearHead:
    """A head below the given number of layers whose scores differ from text to text."""
    layers = [len(reading.model.layers) - 1 - above]
    head = LinearHead.untrained(reading.states(prompt(), layers), 2, above)
    weight = torch.randn(2, 32, generator=torch.Generator().manual_seed(2))
    return head.with_values(size * weight, torch.tensor([0.3, -0.3]))


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
def test_a_head_that_was_planted_is_found_with_its_layer(
    reading: PublicReading, above: int
) -> None:
    wanted_NC = scores_with(reading, planted_head(reading, above))
    fitted = fit_head(reading, objective_with(reading, wanted_NC), prompt(), PromptedStates())
    assert fitted.head.above == above == fitted.statistics["layers_above_head"]
    assert fitted.statistics["held_out_kl_nats"] < 0.02
    # The scores are those of the head, as an evaluation computes them.
    torch.testing.assert_close(fitted.scores, scores_with(reading, fitted.head))
    probabilities = fitted.scores.softmax(dim=1)
    torch.testing.assert_close(probabilities, wanted_NC.softmax(dim=1), atol=0.1, rtol=0)
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
    assert fitted.head.weight.norm() < 0.2 * explained.head.weight.norm()
    statistics = fitted.statistics
    assert statistics["held_out_kl_nats"] < 1.05 * statistics["kl_without_head_nats"]
    assert "leaves 91% of that divergence" in caplog.text


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
    monkeypatch.setattr(fitted_head, "TEXTS_AT_ALL_LAYERS", 40)
    kept = PromptedStates()

    def fit(of: TransferObjective, prompt_nd: torch.Tensor) -> FittedHead:
        return fit_head(reading, of, prompt_nd, kept)

    first = fit(objective, prompt())
    # Half of the texts at four layers; then all of them, at the head's layer and at the last one.
    assert read == [(40, 4 * 32), (80, 2 * 32)]
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
