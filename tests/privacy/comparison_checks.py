"""Checks of the comparison of a private result with what tuning began with."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from privacy.checks import folder, fresh_source, part, plan_of
from privacy.ledger_checks import open_ledger

BEFORE = 40
AFTER = 55


class _Part:
    """Gets 40 validation examples right with its first parameters, and 55 with others."""

    def parameters(self) -> list[torch.Tensor]:
        return [torch.zeros(1)]

    def count_right(self, parameters: list[torch.Tensor]) -> int:
        return AFTER if parameters[0].any() else BEFORE


def gained(noise: float, source: Any, place: Any) -> float:
    """Return the difference that a comparison has kept, after a restart that has lost its key."""
    plan = plan_of(score_noise_multiplier=noise)
    ledger = SimpleNamespace(intend_score=lambda trial, commitment: None)
    run = SimpleNamespace(plan=plan, source=source, checkpoints=place, ledger=ledger)
    trainer = SimpleNamespace(part=_Part(), run=run)
    comparison = part("privacy.comparison").Comparison
    comparison(trainer).finish([torch.ones(1)])
    kept = (place / "comparison.json").read_text()
    # Without its key, a run cannot draw that noise again. So it takes what it has found before.
    run.source = fresh_source("another key")
    comparison(trainer).finish([torch.ones(1)])
    assert (place / "comparison.json").read_text() == kept
    return float(kept)


def a_comparison_has_the_noise_of_the_plan() -> None:
    with folder() as place:
        found = [gained(10.0, fresh_source(), place / str(number)) for number in range(400)]
    differences = (np.array(found) - (AFTER - BEFORE)) / 10
    assert abs(differences.mean()) < 6 / 400**0.5, "the counts before and after are not compared"
    assert 0.85 < differences.std() < 1.15, "the noise of the comparison is not the planned one"


def a_comparison_is_charged_once() -> None:
    plain = plan_of(steps=100)
    plan = replace(plain, score_noise_multiplier=2.0)
    assert not plan.out_of_bounds()
    accounting = part("privacy.accounting")
    assert accounting.account(plan).epsilon > accounting.account(plain).epsilon + 0.1
    # Alone, one step without sampling costs as much as its Gaussian.
    assert plan.spent({1: 100}) == [plan]
    for begun in ({1: 90, 2: 10}, {2: 100}, {1: 0, 2: 7, 3: 93}):
        charged = [each.score_noise_multiplier for each in plan.spent(begun)]
        assert charged.count(2.0) == 1, f"a comparison is charged {charged.count(2.0)} times"
        assert charged.count(None) == len(charged) - 1
    assert plan.spent({}) == [], "a run without a step has compared nothing"
    # What a search spends holds the scores of its trials already.
    search = replace(plan, mean_trials=3.0)
    assert [each.score_noise_multiplier for each in search.spent({2: 5})] == [2.0, None]


def a_count_that_is_released_twice_is_charged_twice() -> None:
    plan = replace(plan_of(steps=3), score_noise_multiplier=2.0)
    assert plan.spent({1: 3}, {1: 1}) == [plan]
    assert plan.spent({1: 3}, {2: 1}) == [replace(plan, score_noise_multiplier=2 / 2**0.5)]
    # Of a search, the scores of repeated trials come on top of its own charge.
    search = replace(plan, mean_trials=3.0)
    assert search.spent({1: 9}, {1: 3}) == [search]
    assert [each.score_noise_multiplier for each in search.spent({1: 9}, {2: 2})] == [2.0, 1.0]
    assert [each.score_noise_multiplier for each in search.spent({2: 3}, {2: 2})] == [2.0, 1.0]

    # Two machines end one run, and count another number of right examples.
    statement = part("privacy.statement")
    source = fresh_source()
    epsilons = []
    for counts in ((), (5,), (5, 5), (5, 6)):
        with folder() as place, open_ledger(place) as opened:
            charged = part("privacy.ledger").LedgerRun(opened, "run", plan, None)
            for step in range(plan.steps):
                charged.intend(0, step, f"{step}")
            run = SimpleNamespace(source=source, ledger=charged)
            for count in counts:
                part("privacy.search").charge_score(run, count, trial=0)
            claim = statement.privacy_statement(charged.spending)
            assert statement.statement_problems(claim) == []
            epsilons.append(claim["epsilon"])
    assert epsilons[0] == epsilons[1] == epsilons[2] < epsilons[3] - 0.05, epsilons


def a_damaged_comparison_does_not_stop_its_run() -> None:
    """Its noise cannot be drawn again without the key."""
    kind = part("privacy.comparison").Comparison
    for text in ("", "x", "[" * 100_000, "null", "9" * 1000):
        with folder() as place:
            compared = kind.__new__(kind)
            compared._file = place / "comparison.json"
            compared._file.write_text(text)
            compared._run = None
            compared.finish(())


def a_comparison_is_in_the_statement() -> None:
    statement = part("privacy.statement")
    spending = part("privacy.spending")
    plan = plan_of(score_noise_multiplier=2.0)
    claim = statement.privacy_statement(spending.Spending(plan, "now").at_the_end())
    assert statement.statement_problems(claim) == []
    # Without it, the numbers would be those of a smaller epsilon.
    plain = plan_of()
    other = statement.privacy_statement(spending.Spending(plain, "now").at_the_end())
    assert other["epsilon"] < claim["epsilon"]
    assert statement.statement_problems(other | {"score_noise_multiplier": 2.0})
    settings = {"privacy": {"enabled": True}, "tune": {"comparison_noise_multiplier": 2.0}}
    assert statement.settings_problems(claim, settings) == []
    assert statement.settings_problems(other, settings)


def a_statement_has_the_search_and_the_target_of_its_settings() -> None:
    statement = part("privacy.statement")
    spending = part("privacy.spending")
    plain = plan_of()
    claim = statement.privacy_statement(spending.Spending(plain, "now").at_the_end())
    section = {"enabled": True, "noise_multiplier": None}
    assert statement.settings_problems(claim, {"privacy": section}) == []
    search = {"mean_trials": 5.0, "score_noise_multiplier": 10.0}
    hidden = {"privacy": section, "tune": {"search": search}}
    assert statement.settings_problems(claim, hidden), (
        "the search of a manifest is not in its claim"
    )
    compared = claim | {"score_noise_multiplier": 10.0}
    assert statement.settings_problems(compared, hidden), "a comparison passes for a search"
    claimed = claim | {"mean_trials": 5.0, "score_noise_multiplier": 10.0}
    assert statement.settings_problems(claimed, hidden) == []
    assert statement.settings_problems(claimed, {"privacy": section})
    # Calibrated noise gives nearly the epsilon that was wanted.
    for share, fits in ((1.001, True), (3.0, False)):
        wanted = section | {"target_epsilon": share * claim["epsilon"]}
        assert (statement.settings_problems(claim, {"privacy": wanted}) == []) is fits


CHECKS: list[Callable[[], None]] = [
    a_comparison_has_the_noise_of_the_plan,
    a_comparison_is_charged_once,
    a_count_that_is_released_twice_is_charged_twice,
    a_damaged_comparison_does_not_stop_its_run,
    a_comparison_is_in_the_statement,
    a_statement_has_the_search_and_the_target_of_its_settings,
]
