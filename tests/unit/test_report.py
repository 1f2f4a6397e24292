"""The report of an evaluation: its table as text, and its page."""

import json
from pathlib import Path

from post_dist.report import finished_evaluation, read_table, write_report
from post_dist.report.tables import table_text

ROW = {
    "name": "zero-shot",
    "accuracy_micro": 0.75,
    "interval_95": [0.7, 0.8],
    "accuracy_macro": 0.74,
    "auc": None,
    "n": 100,
    "epsilon": None,
}


def write_evaluation(runs: Path, *rows: dict, task: str = "toy") -> Path:
    evaluation = runs / "evaluate-0"
    (evaluation / "artifact").mkdir(parents=True)
    table = {"task": task, "split": "test", "test_readings": 2, "rows": list(rows)}
    (evaluation / "artifact" / "table.json").write_text(json.dumps(table))
    return evaluation


def test_the_table_as_text(tmp_path: Path) -> None:
    table = read_table(write_evaluation(tmp_path, ROW, ROW | {"name": "a", "epsilon": 8.0}))
    lines = table_text(table).splitlines()
    assert lines[0].strip() == "toy, test split (read 2 times)"
    first, second = (line.replace("│", " ").split() for line in lines[4:6])
    assert first == ["zero-shot", "75.0", "70.0", "to", "80.0", "74.0", "none", "100", "none"]
    assert second == ["a", "75.0", "70.0", "to", "80.0", "74.0", "none", "100", "8.00"]


def test_a_task_that_generates_text_has_its_own_columns(tmp_path: Path) -> None:
    row = {"name": "a", "exact_match": 0.5, "interval_95": [0.4, 0.6], "rouge_1": 0.6}
    row |= {"rouge_l": 0.55, "n": 10, "epsilon": None}
    page = write_report(write_evaluation(tmp_path, row))
    assert "<th>exact match %</th>" in page.read_text()
    assert (
        "| a | 50.0 | 40.0 to 60.0 | 60.0 | 55.0 | 10 | none |"
        in (tmp_path / "report.md").read_text()
    )


def test_the_page_escapes_names_and_holds_its_plots(tmp_path: Path) -> None:
    (tmp_path / "distill-1").mkdir()
    line = json.dumps({"step": 1, "loss": 2.0, "ce": 1.0})
    (tmp_path / "distill-1" / "metrics.jsonl").write_text(line + "\n")
    evaluation = write_evaluation(tmp_path, ROW | {"name": "<b>bold</b>"}, task="<script>")
    assert finished_evaluation(tmp_path) == evaluation
    text = write_report(evaluation).read_text()
    assert "<script>" not in text
    assert "<td>&lt;b&gt;bold&lt;/b&gt;</td><td>75.0</td>" in text
    assert f"<title>{tmp_path.name}: &lt;script&gt;, test split (read 2 times)</title>" in text
    assert text.count('src="data:image/png;base64,') == 2
