"""Durations and bars on a terminal."""

import pytest

from post_dist.commands.privacy import budget_lines
from post_dist.errors import InputError
from post_dist.runtime.terminal import bar, duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.02, "0.02 s"),
        (59, "59 s"),
        (59.97, "1.0 minutes"),
        (90, "1.5 minutes"),
        (3599.9, "1.0 hours"),
        (11520, "3.2 hours"),
        (4 * 86400, "4.0 days"),
    ],
)
def test_a_duration_has_the_unit_that_fits(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_bar_is_filled_to_its_share() -> None:
    assert [bar(share).count("█") for share in (-1, 0, 0.5, 1, 3)] == [0, 0, 10, 20, 20]
    assert {len(bar(share)) for share in (-1, 0, 0.5, 1, 3)} == {20}


def test_a_terminal_gets_no_control_character_of_an_error() -> None:
    error = InputError("run.yaml: two errors\n  - \x1b[31mred\r\u202e", "give \x07 another")
    assert str(error) == "run.yaml: two errors\n  - \\x1b[31mred\\r\\u202e\n  give \\x07 another"


def test_a_budget_is_a_sentence_and_bars() -> None:
    run = {"run": "a" * 16, "opened": "2026-11-28T07:56:19", "private": True, "epsilon": 4.0}
    run |= {"steps_charged": 80, "steps_planned": 100}
    whole = {"epsilon": 4.0, "delta": 1e-5, "private": True, "cap": 8.0, "anchor": None}
    lines = budget_lines(whole | {"runs": [run]})
    assert lines[0] == "1 run has spent epsilon 4.000 of 8, at delta 1e-05."
    assert lines[2] == f"{'a' * 16}  {bar(0.5)}    4.000  2026-11-28  80 of 100 steps"
    assert lines[3] == f"together          {bar(0.5)}    4.000"
    seeded = run | {"private": False, "epsilon": None}
    public = whole | {"private": False, "epsilon": float("inf"), "cap": None}
    lines = budget_lines(public | {"runs": [seeded]})
    assert lines[0].endswith("epsilon infinity, at delta 1e-05; no limit is set.")
    assert bar(1) in lines[2]
