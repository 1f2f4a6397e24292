"""Durations, bars and next commands on a terminal."""

import csv
import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny

from post_dist import PromptResult, load_run
from post_dist.commands.predict import _json_line, _print_csv
from post_dist.commands.privacy import budget_lines
from post_dist.commands.stages import _predict_command
from post_dist.errors import InputError
from post_dist.runtime.terminal import bar, duration
from post_dist.serving.predictions import Response


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


def test_a_terminal_gets_no_control_character_of_a_response(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    steering = "a\x1b[2J\x7f\x85\x9b31m\u202eb\u200f\u2028, \U000e0041 \n ü 雪 😀"
    line = _json_line({"response": steering})
    assert line.isprintable()
    assert json.loads(line) == {"response": steering}
    assert line.endswith(' ü 雪 😀"}'), "what prints stays readable"
    # A terminal without all characters gets them as escapes of JSON.
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="latin-1"))
        line = _json_line({"response": steering})
    assert line.isascii()
    assert json.loads(line) == {"response": steering}
    # A file gets the response as it is.
    _print_csv([Response(steering)], ())
    assert list(csv.reader(io.StringIO(capsys.readouterr().out)))[1] == [steering]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    _print_csv([Response(steering)], ())
    heading, shown = capsys.readouterr().out.splitlines()
    assert heading == "response"
    assert shown.isprintable()
    assert shown.startswith('"a\\x1b[2J\\x7f\\x85')


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
    # An accountant may find no epsilon for what private runs have spent together.
    much = whole | {"epsilon": float("inf"), "cap": None, "anchor": "a\x1b[2J\nb"}
    lines = budget_lines(much | {"runs": [run]})
    assert lines[0].endswith("epsilon infinity, at delta 1e-05; no limit is set.")
    assert lines[3] == f"together          {bar(1)} infinity"
    assert lines[4] == "The anchor a [2J b shows no removed row."


def test_tuning_is_followed_by_a_command_if_predict_can_read_the_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = tiny.write_run(tmp_path)
    tuned = PromptResult(tmp_path / "a", tmp_path / "a b", 8.0, 1e-5, student=Path("/student"))
    config = load_run(run, ["private_task.text='{body text}'"])
    assert _predict_command(config, tuned) == (
        "post-dist predict 'a b' NEW.csv --model /student --column 'body text'"
    )
    for text in ("{title} {body}", "Title: {title}"):
        config = load_run(run, [f"private_task.text='{text}'"])
        assert _predict_command(config, tuned) is None
    assert _predict_command(load_run(run), replace(tuned, student=None)) is None
