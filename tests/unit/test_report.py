"""The report of an evaluation: its table as text, and its page."""

import json
import os
import re
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import report_run
from border.hostile import sign
from report_run import HOSTILE, table_row, write_full_run, write_table

from post_dist.artifacts.manifest import parse_manifest
from post_dist.config.yaml_files import write_yaml
from post_dist.privacy.anchor import claim_anchor, default_anchor_folder
from post_dist.privacy.ledger import lock_ledger
from post_dist.privacy.spending import Cap
from post_dist.report import finished_evaluation, read_table, write_report
from post_dist.report.charts import loss_chart
from post_dist.report.lineage import ReportedArtifact
from post_dist.report.tables import cautions, table_text

ROW = table_row("zero-shot", 0.75)


def page_of(evaluation: Path) -> str:
    return write_report(evaluation).read_text()


def test_the_table_as_text(tmp_path: Path) -> None:
    table = read_table(write_table(tmp_path, ROW, ROW | {"name": "[bold]a", "epsilon": 8.0}))
    lines = table_text(table).splitlines()
    assert lines[0].strip() == "toy, test split (read 2 times)"
    first, second = (line.replace("│", " ").split() for line in lines[4:6])
    assert first == ["zero-shot", "75.0", "72.0", "to", "78.0", "74.0", "90.0", "835", "none"]
    assert second == ["[bold]a", "75.0", "72.0", "to", "78.0", "74.0", "90.0", "835", "8.00"]


def test_a_task_that_generates_text_has_its_own_columns(tmp_path: Path) -> None:
    row = {"name": "a", "exact_match": 0.5, "interval_95": [0.4, 0.6], "rouge_1": 0.6}
    row |= {"rouge_l": 0.55, "n": 10, "epsilon": None}
    page = page_of(write_table(tmp_path, row))
    none_right = [row | {"name": name, "exact_match": 0.0} for name in ("student", "transferred")]
    assert cautions({"rows": none_right}) == []
    assert '<th scope="col">exact match %</th>' in page
    assert "<h2>Exact match with its 95% interval</h2>" in page
    assert (
        "| a | 50.0 | 40.0 to 60.0 | 60.0 | 55.0 | 10 | none |"
        in (tmp_path / "report.md").read_text()
    )


def test_names_from_files_are_text_and_nothing_else(tmp_path: Path) -> None:
    evaluation = write_table(tmp_path, ROW | {"name": HOSTILE}, ROW, task=HOSTILE)
    assert finished_evaluation(tmp_path) == evaluation
    page = page_of(evaluation)
    assert "<script" not in page
    assert "<td>&lt;script&gt;alert(1)&lt;/script&gt; | `a`  [31m[bold]" in page
    assert "\x1b" not in page
    markdown = (tmp_path / "report.md").read_text()
    name = r"&lt;script&gt;alert(1)&lt;/script&gt; \| \`a\`  \[31m\[bold\] \# b"
    assert f"\n| {name} | 75.0 |" in markdown
    assert "\x1b" not in table_text(read_table(evaluation))


def test_the_page_runs_no_script_and_loads_nothing(tmp_path: Path) -> None:
    page = page_of(write_full_run(tmp_path))
    active = re.findall(
        r"<(?:script|link|img|iframe|object)|\b(?:src|href|on\w+)=|url\(|@import", page
    )
    assert active == []


def test_the_verdict_names_the_change_epsilon_and_delta(tmp_path: Path) -> None:
    page = page_of(write_full_run(tmp_path))
    assert "<h1>The transferred prompt takes the large LLM from 75.0% to 84.0%</h1>" in page
    assert "The two 95% intervals do not overlap." in page
    assert "ε = 1.00 and δ = 1.0e-05, for one example." in page
    assert "guessing, 1 of 2" in page
    assert "<b>10×4096</b>prompt vectors" in page


def test_a_classifier_without_a_model_that_is_ahead_is_named(tmp_path: Path) -> None:
    rows = [table_row("student", 0.75), table_row("student + prompt", 0.76)]
    for simple, said in ((0.755, False), (0.77, True)):
        place = tmp_path / str(said)
        place.mkdir()
        table = write_table(place, *rows, table_row("TF-IDF + logistic regression", simple))
        sentence = "TF-IDF + logistic regression is ahead of every prompt, with 77.0%."
        assert (sentence in page_of(table)) == said
        assert (sentence in table_text(read_table(table))) == said


@pytest.mark.parametrize(
    ("majority", "headline", "sentence"),
    [
        (0.7, "from 75.0% to 76.0%", ""),
        (0.76, "from 75.0% to 76.0%, and the majority class reaches 76.0%", "as good as the best"),
        (0.95, "from 75.0% to 76.0%, and the majority class reaches 95.0%", "ahead of every"),
    ],
)
def test_a_prompt_no_better_than_the_majority_class_is_not_praised(
    tmp_path: Path, majority: float, headline: str, sentence: str
) -> None:
    rows = [table_row("student", 0.75), table_row("majority class", majority)]
    table = write_table(tmp_path, *rows, table_row("student + prompt", 0.76))
    page = page_of(table)
    assert f"<h1>The prompt takes the student {headline}</h1>" in page
    said = f"The majority class is {sentence} prompt, with {100 * majority:.1f}%."
    for text in (page, (tmp_path / "report.md").read_text(), table_text(read_table(table))):
        assert (said in text) == bool(sentence)


def test_a_classifier_as_good_as_the_best_prompt_is_named(tmp_path: Path) -> None:
    names = ("student", "TF-IDF + logistic regression", "DP logistic regression, epsilon 8")
    rows = [table_row(name, 0.75) for name in (*names, "student + prompt", "transferred")]
    text = table_text(read_table(write_table(tmp_path, *rows)))
    assert "DP logistic regression, epsilon 8 is as good as the best prompt, with 75.0%." in text
    assert "TF-IDF + logistic regression is" not in text


def test_a_split_with_one_class_is_called_so(tmp_path: Path) -> None:
    names = ("student", "majority class", "student + prompt")
    rows = [table_row(name, 1.0) | {"auc": None, "interval_95": [0.9, 1.0]} for name in names]
    table = write_table(tmp_path, *rows)
    for text in (page_of(table), table_text(read_table(table))):
        assert "All examples of this split have one class" in text
        assert "The majority class is as good as the best prompt, with 100.0%." in text


def test_a_prompt_without_privacy_is_called_so(tmp_path: Path) -> None:
    rows = [table_row("student", 0.75), table_row("student + prompt", 0.76)]
    page = page_of(write_table(tmp_path, *rows))
    assert "The prompt takes the student from 75.0% to 76.0%" in page
    assert "The two 95% intervals overlap, so the difference may be chance." in page
    assert "Tuned without differential privacy" in page


def test_the_lineage_is_what_the_evaluation_recorded_and_its_files_are_checked(
    tmp_path: Path,
) -> None:
    evaluation = write_full_run(tmp_path)
    report_run.write_part(tmp_path, "transfer-2", "soft prompt", {}, transfer={"steps": 77})
    (tmp_path / "distill-1/artifact/config.json").write_text("{} ")
    page = page_of(evaluation)
    assert "2 of 4 layers" not in page
    assert "objective proxy, 400 steps, ε = 1.00" in page
    assert "<b>warm-start</b>" in page
    assert page.count("✓ files match their hashes") == 3
    assert page.count("✗ files were changed") == 1
    assert "77 steps" not in page


def test_settings_that_the_evaluation_has_not_seen_are_not_shown(tmp_path: Path) -> None:
    evaluation = write_full_run(tmp_path)
    path = tmp_path / "tune-1/artifact/post_dist.json"
    manifest = json.loads(path.read_text())
    manifest["config"]["tune"]["num_virtual_tokens"] = 99
    path.write_text(json.dumps(manifest))
    page = page_of(evaluation)
    assert page.count("✓ files match their hashes") == 2
    assert "99 prompt vectors" not in page


def test_nothing_vouches_for_the_settings_of_an_older_artifact(tmp_path: Path) -> None:
    """The digest of its manifest covers its files alone."""
    write_full_run(tmp_path)
    path = tmp_path / "distill-1/artifact/post_dist.json"
    manifest = json.loads(path.read_text()) | {"schema_version": 1}
    path.write_text(json.dumps(manifest))
    student = parse_manifest(path).digest
    shutil.rmtree(tmp_path / "evaluate-0")
    page = page_of(write_table(tmp_path, ROW, student=student))
    assert "✓ files match their hashes; nothing covers the settings (older version)" in page


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"adapter": "head", "steps": 5000}, "objective ensemble, linear head"),
        ({"adapter": "lora", "steps": 5000}, "objective ensemble, LoRA, 5000 steps"),
        ({"adapter": "prefix", "steps": 5000}, "objective ensemble, prefix, 5000 steps"),
        ({"adapter": ["head"], "steps": 5000}, "objective ensemble, 5000 steps"),
    ],
)
def test_a_head_on_the_large_llm_has_no_steps(settings: dict, said: str) -> None:
    made = ReportedArtifact(
        "transferred", "0", config={"transfer": {"objective": "ensemble", **settings}}
    )
    assert made.detail == said


def test_an_owner_with_a_downloaded_model_reads_its_plan_and_no_distillation(
    tmp_path: Path,
) -> None:
    claim = {"private": True, "epsilon": 8.0, "delta": 1e-3, "unit": "one example", "steps": 80}
    tuned = report_run.write_part(
        tmp_path, "tune-1", "soft prompt", {"privacy.json": claim}, {"model": "c" * 64},
        tune={"num_virtual_tokens": 10, "steps": 1000}, student_checked=False,
    )  # fmt: skip
    rows = [table_row("student", 0.75), table_row("student + prompt", 0.76, 8.0)]
    parents = {"student": "c" * 64, "student + prompt": tuned}
    page = page_of(write_table(tmp_path, *rows, **parents))
    assert "10 prompt vectors, 80 steps, ε = 8.00" in page
    assert "<b>a model without a manifest</b>" in page
    assert "✗ trusted, not checked" in page
    assert "<b>distill</b>" not in page


def test_losses_on_private_data_stay_out(tmp_path: Path) -> None:
    evaluation = write_full_run(tmp_path)
    report_run.write_metrics(tmp_path / "tune-1", loss=12345.0)
    (tmp_path / "tune-1/metrics.jsonl").rename(tmp_path / "tune-1/private_metrics.jsonl")
    page = page_of(evaluation)
    assert page.count("loss by step") == 2 * 2  # label and title of two charts
    assert "1.23e+04" not in page


def test_a_long_log_gives_a_short_curve_and_skipped_steps_none(tmp_path: Path) -> None:
    lines = [{"step": step, "loss": float(step % 7)} for step in range(10_000)]
    lines[3]["loss"] = float("nan")
    chart = loss_chart("a", lines, {"loss": "loss"})
    assert chart is not None
    assert len(chart.svg) < 8_000
    assert "nan" not in chart.svg
    assert loss_chart("a", [{"step": 0}], {"loss": "loss"}) is None


def test_the_page_is_for_its_owner_alone(tmp_path: Path) -> None:
    (tmp_path / "report.html").touch(0o644)
    page = write_report(write_table(tmp_path, ROW))
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (page, tmp_path / "report.md")]
    assert modes == [0o600, 0o600]


def test_the_budget_of_the_data_is_that_of_the_ledger(tmp_path: Path) -> None:
    evaluation = write_full_run(tmp_path / "runs")
    task = {"name": "toy", "visibility": "private", "path": str(tmp_path / "a.csv")}
    task |= {"template": "{text} is", "labels": {"0": ["bad"], "1": ["good"]}}
    settings = {"name": "a", "private_task": task}
    (tmp_path / "runs/tune-1/resolved.yaml").write_text(write_yaml(settings))
    assert "Privacy budget" not in page_of(evaluation)
    ledger = tmp_path / "a.csv.ledger.jsonl"
    anchor = claim_anchor(default_anchor_folder(), ledger, (), may_move=False)
    with lock_ledger(anchor) as opened:
        opened.set_cap(Cap(10.0, 1e-5))
    page = page_of(evaluation)
    assert "ε = 0.00 at δ = 1.0e-05 is spent by all runs together." in page
    assert "The cap is ε = 10.00." in page
    ledger.write_text(json.dumps({"row": "cap"}) + "\n")
    assert '<p class="bad">' in page_of(evaluation)


@pytest.mark.parametrize(
    "change",
    [
        {"rows": []},
        {"rows": ["x"]},
        {"rows": [ROW | {"accuracy_micro": "0.9"}]},
        {"rows": [ROW | {"accuracy_micro": float("nan")}]},
        {"rows": [ROW | {"interval_95": [0.5]}]},
        {"rows": [ROW | {"epsilon": 10**400}]},
        {"rows": [ROW | {"name": ["a"]}]},
        {"rows": [ROW | {"name": "a" * 10**6}]},
        {"rows": [{"name": "a"}]},
        {"test_readings": "often"},
    ],
)
def test_a_table_of_others_that_evaluate_does_not_write_is_refused(
    tmp_path: Path, main: Callable, change: dict
) -> None:
    evaluation = write_table(tmp_path, ROW)
    file = evaluation / "artifact/table.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    (evaluation / "artifact/post_dist.json.sig").unlink(missing_ok=True)
    sign(evaluation / "artifact")
    code, _, err = main("report", tmp_path)
    assert code == 4, err
    assert len(err) < 1000
    assert not (tmp_path / "report.html").exists()


def test_a_run_of_others_is_read_through_the_door(tmp_path: Path, main: Callable) -> None:
    """A pipe, a sparse file or a link in it is not waited for, read or followed."""
    evaluation = write_full_run(tmp_path / "runs")
    adapter = tmp_path / "runs/tune-1/artifact/adapter_config.json"
    adapter.unlink()
    os.mkfifo(adapter)
    with (tmp_path / "runs/transfer-1/artifact/adapter_config.json").open("wb") as sparse:
        sparse.truncate(1 << 40)
    with (tmp_path / "runs/distill-1/metrics.jsonl").open("wb") as sparse:
        sparse.truncate(1 << 40)
    assert page_of(evaluation).count("files were changed") >= 2
    table = evaluation / "artifact/table.json"
    table.unlink()
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
        make(table)
        assert main("report", tmp_path / "runs")[0] == 4
        table.unlink()
