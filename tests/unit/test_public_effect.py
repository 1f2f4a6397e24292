"""What a prompt does to the target on public text, against one text at a time without padding."""

import logging
import math
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from objectives import INFORMATIVE, TASK, objective_of
from torch.nn import functional

from post_dist.losses import pieces
from post_dist.models.language_model import LanguageModel
from post_dist.models.load import load_whole
from post_dist.runtime.distributed import World
from post_dist.stages.transfer.effect import effect_on_public_text, report_effect
from post_dist.stages.transfer.objective import TransferObjective

ONE_RANK = World(0, 1, 0, "none", torch.device("cpu"))
TASKS = {
    "llama": TASK,
    "roberta": replace(TASK, template="{text} It was {mask}."),
    "response": replace(TASK, label_words=(), max_response_length=4),
}


def model_and_objective(folder: Path, name: str) -> tuple[LanguageModel, TransferObjective]:
    family = "llama" if name == "response" else name
    tiny.write_model(folder, family)
    tiny.speak_up(folder)
    target = load_whole(folder, "fp32", torch.device("cpu"))
    return target, objective_of(folder, target, TASKS[name])


@torch.no_grad()
def by_hand(
    target: LanguageModel, objective: TransferObjective, prompt_nd: torch.Tensor
) -> tuple[float, torch.Tensor]:
    """Return the perplexity and the class of each of every second text."""
    losses = []
    classes = []
    n = len(prompt_nd)
    for example in objective.examples[::2]:
        ids = torch.tensor(example.token_ids)
        inputs = torch.cat([prompt_nd, target.embed(ids)])[None]
        logits = target.model(inputs_embeds=inputs).logits[0, n:]
        end = example.answer
        losses.append(functional.cross_entropy(logits[:end], ids[1 : end + 1], reduction="none"))
        words = objective.reader.verbalizer.tokens
        classes.append(logits[example.answer, list(words)].argmax() if words else torch.tensor(0))
    return float(torch.cat(losses).mean().exp()), torch.stack(classes)


@pytest.mark.parametrize("name", TASKS)
def test_the_effect_is_that_of_a_text_at_a_time(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The logits of a batch come in several pieces.
    monkeypatch.setattr(pieces, "LOGITS_AT_ONCE", 1 << 14)
    target, objective = model_and_objective(tmp_path / "model", name)
    prompt = 0.5 * torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    effect = effect_on_public_text(target, objective, prompt, ONE_RANK)
    before, classes_before = by_hand(target, objective, prompt[:0])
    after, classes_after = by_hand(target, objective, prompt)

    wanted = {"texts": 40}
    if name != "roberta":
        assert after != pytest.approx(before, rel=0.01)
        wanted |= {"perplexity_without_prompt": before, "perplexity_with_prompt": after}
    if name != "response":
        share_before = float(classes_before.double().mean())
        share_after = float(classes_after.double().mean())
        changed = float((classes_before != classes_after).double().mean())
        assert 0 < changed < 1
        wanted |= {
            "class_shares_without_prompt": [1 - share_before, share_before],
            "class_shares_with_prompt": [1 - share_after, share_after],
            "label_shift": abs(share_after - share_before),
            "changed_answers": changed,
        }
    assert set(effect) == set(wanted)
    for figure, value in wanted.items():
        assert effect[figure] == pytest.approx(value, rel=1e-4, abs=1e-4), figure


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.levelname == "WARNING"]


def test_a_prompt_that_spoils_the_target_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    target, objective = model_and_objective(tmp_path / "model", "llama")
    caplog.set_level(logging.INFO)
    mild = torch.zeros(5, 32)
    loud = 1e4 * torch.ones(5, 32)
    for prompt, warned in ((mild, False), (loud, True)):
        effect = effect_on_public_text(target, objective, prompt, ONE_RANK)
        caplog.clear()
        report_effect("mine", effect, INFORMATIVE)
        assert "label shift" in caplog.text
        assert bool(warnings_of(caplog)) == warned


def test_warnings_follow_the_figures(caplog: pytest.LogCaptureFixture) -> None:
    quiet = {
        "texts": 64,
        "perplexity_without_prompt": 20.0,
        "perplexity_with_prompt": 59.0,
        "class_shares_without_prompt": [0.5, 0.5],
        "class_shares_with_prompt": [0.05, 0.95],
        "label_shift": 0.45,
        "changed_answers": 0.45,
    }
    report_effect("mine", quiet, INFORMATIVE)
    assert not warnings_of(caplog)
    report_effect("mine", quiet | {"perplexity_with_prompt": 61.0}, INFORMATIVE)
    assert "raises the perplexity of public text 3.0 times" in caplog.text
    caplog.clear()
    one_class = quiet | {"class_shares_with_prompt": [0.04, 0.96]}
    report_effect("mine", one_class, INFORMATIVE)
    assert "gives one class to 96% of the public texts" in caplog.text
    caplog.clear()
    # The builder has warned of such a source prompt already.
    report_effect("mine", one_class, {"class_information_nats": 0.001})
    assert not warnings_of(caplog)


def test_a_model_that_breaks_has_a_number(tmp_path: Path) -> None:
    """A manifest is JSON, which has neither infinity nor NaN."""
    target, objective = model_and_objective(tmp_path / "model", "llama")
    broken = torch.full((5, 32), math.nan)
    effect = effect_on_public_text(target, objective, broken, ONE_RANK)
    assert effect["perplexity_with_prompt"] == pytest.approx(math.exp(100))
