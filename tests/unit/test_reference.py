"""The committed reference pages are what the code generates, and describe every field."""

import runpy
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "docs"
GENERATOR = runpy.run_path(str(FOLDER / "reference.py"))


@pytest.mark.parametrize("name", ["run-file.md", "commands.md", "run-file.schema.json"])
def test_the_reference_is_what_the_code_says(name: str) -> None:
    written = (FOLDER / "reference" / name).read_text()
    assert written == GENERATOR["pages"]()[name], "run: python docs/reference.py"


def test_every_field_and_option_is_described() -> None:
    for section in GENERATOR["places"]():
        missing = set(section.model_fields) - set(GENERATOR["descriptions"](section))
        assert not missing, f"{section.__name__}: {missing}"
    page = (FOLDER / "reference" / "commands.md").read_text()
    assert "|  |" not in page
