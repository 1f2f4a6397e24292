"""`examples/paper/row.py` and the paper's run files, on small models and data."""

import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import yaml

from post_dist.config.assets import asset
from post_dist.config.load import load_run

FOLDER = asset("examples/paper")
ROWS = yaml.safe_load((FOLDER / "published.yaml").read_text())["rows"]
FAMILIES = {"roberta_base": "roberta", "gpt2_xl": "gpt2", "llama2_7b": "llama"}
SMALL = {
    "teacher.revision": "null",
    "corpus.sequence_length": 32,
    "corpus.held_out_sequences": 4,
    "distill.steps": 1,
    "distill.batch_size": 4,
    "tune.steps": 2,
    "privacy.sampling_probability": 0.1,
    "transfer.steps": 1,
    "private_task.max_length": 24,
    "public_task.max_length": 24,
    "private_task.labels": "{'0': [bad], '1': [good]}",
    "private_task.test_hub_split": "null",
}


@pytest.mark.parametrize(
    "model",
    [
        "roberta_base",
        pytest.param("gpt2_xl", marks=pytest.mark.slow),
        pytest.param("llama2_7b", marks=pytest.mark.slow),
    ],
)
def test_a_row_is_run_and_printed_beside_the_published_one(tmp_path: Path, model: str) -> None:
    tiny.write_model(tmp_path / "model", FAMILIES[model])
    private = tiny.write_csv(tmp_path / "private.csv", tiny.sentences(60, 1))
    public = tiny.write_csv(tmp_path / "public.csv", tiny.sentences(60, 2))
    places = {
        "teacher.path": tmp_path / "model",
        "corpus.path": public,
        "private_task.path": private,
        "public_task.path": public,
    }
    options = [f"--set={place}={value}" for place, value in (SMALL | places).items()]
    command = [
        sys.executable,
        FOLDER / "row.py",
        model,
        "sst2",
        "imdb",
        *options,
        "--output",
        tmp_path / "runs",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    beside = {
        line[:40].strip(): line[40:].split()
        for line in done.stdout.splitlines()
        if line[40:].strip()
    }
    published = ROWS[model]["sst2"]
    assert beside["zero-shot"][1] == f"{published['zero-shot']:.2f}"
    for name, theirs in (
        ("published transfer", published["public"]["imdb"]),
        ("full prompt tuning", published["full prompt tuning"]),
    ):
        for epsilon, published_number in zip(("", ", epsilon 8"), theirs, strict=True):
            ours, paper, difference = map(float, beside[name + epsilon])
            assert paper == published_number
            assert difference == pytest.approx(ours - paper, abs=0.006)
    assert len(beside["transferred, epsilon 8"]) == 1, "the paper has no such row"


def test_every_row_of_the_paper_is_a_run_file() -> None:
    """Rows whose data have no revision that was seen in public say so."""
    sys.path.insert(0, str(FOLDER))
    from row import published_numbers, settings

    published = yaml.safe_load((FOLDER / "published.yaml").read_text())
    for model, rows in ROWS.items():
        for private, row in rows.items():
            for public in row["public"]:
                changes = [
                    change.removeprefix("--set=")
                    for change in settings(model, private, public, row, published["tasks"][private])
                ]
                revision = (
                    ["private_task.revision=commit"] if private in ("arisetv", "mpqa") else []
                )
                config = load_run(FOLDER / f"{model}.yaml", [*changes, *revision], None)
                assert config.tune.steps * config.tune.batch_size > 20 * 4000, (
                    "epochs over thousands of rows"
                )
                assert ("{mask}" in config.private_task.template) == (model == "roberta_base")
                assert all(0 < number < 100 for number in published_numbers(row, public).values())
    assert sum(len(row["public"]) for rows in ROWS.values() for row in rows.values()) == 24


def test_a_row_that_the_paper_lacks_is_refused() -> None:
    done = subprocess.run(
        [sys.executable, FOLDER / "row.py", "llama2_7b", "imdb", "sst2"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "has no row of llama2_7b for imdb" in done.stderr
    assert "mpqa boolq" in done.stderr
