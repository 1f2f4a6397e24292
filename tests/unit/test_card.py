"""Model cards: what they say, and that no name can break their metadata or their table."""

from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from post_dist.artifacts.card import write_card

ODD = [
    "a: b",
    "# no comment",
    "- [x",
    "'\"",
    "prompt | tuning",
    "naïve ↦ 雪",
    "---",
    "{y: 1}",
    "no",
]


def test_a_card_has_metadata_settings_and_notes(tmp_path: Path) -> None:
    write_card(
        tmp_path,
        "Soft prompt for the student",
        "A soft prompt.",
        {"steps": 3, "cross_checks": {"rdp": 1.5, "prv": 1.25}},
        library="peft",
        tag="prompt-tuning",
        notes={"What epsilon does not cover": ["other prompts", "the time"]},
    )
    text = (tmp_path / "README.md").read_text()
    assert text.startswith(
        "---\nlibrary_name: peft\ntags:\n- post_dist\n- prompt-tuning\n---\n"
        "# Soft prompt for the student\n\nA soft prompt.\n\n| setting | value |\n|---|---|\n"
    )
    assert "| steps | 3 |\n| cross_checks, rdp | 1.5 |\n| cross_checks, prv | 1.25 |\n" in text
    assert "## What epsilon does not cover\n\n- other prompts\n- the time\n" in text
    assert "hashes and lineage are in `post_dist.json`" in text


@pytest.mark.parametrize("name", ODD)
def test_odd_names_leave_the_metadata_well_formed(tmp_path: Path, name: str) -> None:
    write_card(tmp_path, f"Soft prompt for {name}", name, {name: name}, library=name, tag=name)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.to_dict() == {"library_name": name, "tags": ["post_dist", name]}
    assert card.text.startswith(f"# Soft prompt for {name}\n")


def test_a_value_stays_in_its_cell(tmp_path: Path) -> None:
    write_card(tmp_path, "a\nb", "", {"template": "{text} | yes\nno"}, library="peft")
    text = (tmp_path / "README.md").read_text()
    assert "\n# a b\n" in text
    assert "\n| template | {text} \\| yes no |\n" in text


def test_a_value_is_shown_as_it_is(tmp_path: Path) -> None:
    write_card(tmp_path, "a", "", {"classes": "<img src=x> [y](http://z) `c`"}, library="peft")
    text = (tmp_path / "README.md").read_text()
    assert "| classes | &lt;img src=x&gt; \\[y\\](http://z) \\`c\\` |" in text
