"""The YAML of run files: recorded documents and what each one means."""

import datetime
from pathlib import Path

import pytest

from post_dist.config.assets import asset
from post_dist.config.yaml_files import read_yaml, write_yaml
from post_dist.errors import InputError

SCALARS: dict[str, object] = {
    # Words. Only `true` and `false` are booleans, as they are written here.
    "yes": "yes",
    "no": "no",
    "on": "on",
    "off": "off",
    "Yes": "Yes",
    "No": "No",
    "True": "True",
    "FALSE": "FALSE",
    "true": True,
    "false": False,
    # Nothing.
    "~": None,
    "null": None,
    "Null": None,
    "NULL": None,
    "": None,
    # Numbers with a fraction or an exponent.
    "1e-3": 0.001,
    "1E5": 100000.0,
    "1.5e3": 1500.0,
    "1e+3": 1000.0,
    "-1e3": -1000.0,
    ".5": 0.5,
    "-.5": -0.5,
    "5.": 5.0,
    "1_000.5": 1000.5,
    "1e400": float("inf"),
    # Not numbers.
    "1e": "1e",
    "1e5x": "1e5x",
    "1_0e3": "1_0e3",
    "1.2.3": "1.2.3",
    ".inf": ".inf",
    ".nan": ".nan",
    "64G": "64G",
    # Whole numbers, as in YAML 1.1: a leading 0 is octal. A colon does not count in sixties.
    "1_000": 1000,
    "+5": 5,
    "0x1F": 31,
    "0b101": 5,
    "017": 15,
    "-017": -15,
    "08": "08",
    "0o17": "0o17",
    "1:30": "1:30",
    "24:00:00": "24:00:00",
    "0": 0,
    "2024-01-01": datetime.date(2024, 1, 1),
    "'no'": "no",
    '"1e3"': "1e3",
    "b#c": "b#c",
}


@pytest.mark.parametrize("written", SCALARS)
def test_a_scalar_means_what_was_recorded(written: str) -> None:
    expected = SCALARS[written]
    value = read_yaml(f"a: {written}", "f")["a"]
    assert value == expected
    assert type(value) is type(expected)


DOCUMENTS: dict[str, object] = {
    "a: {no: [no, No], yes: [yes]}": {"a": {"no": ["no", "No"], "yes": ["yes"]}},
    "x: &b {n: 4, g: 8}\ny: &l {<<: *b, n: 2}\nz: *l": {
        "x": {"n": 4, "g": 8},
        "y": {"n": 2, "g": 8},
        "z": {"n": 2, "g": 8},
    },
    # Longer keys on purpose: PyYAML 6.0.4 gets this wrong for keys of one character.
    # `b` merges `a` and overrides it; `z` merges `b` and overrides it again.
    "x: &a {steps: 1}\ny: {<<: &b {<<: *a, steps: 2}}\nz: {<<: *b, steps: 3}": {
        "x": {"steps": 1},
        "y": {"steps": 2},
        "z": {"steps": 3},
    },
    "x: &a {q: 1}\nw: &c {r: 2, q: 3}\ny: {<<: [*a, *c], z: 1}": {
        "x": {"q": 1},
        "w": {"r": 2, "q": 3},
        "y": {"q": 1, "r": 2, "z": 1},
    },
    "1: a\n'1': b": {1: "a", "1": "b"},
    "a: |\n  one\n  two\n": {"a": "one\ntwo\n"},
    "- 1\n- 2": [1, 2],
    "": None,
}


@pytest.mark.parametrize("text", DOCUMENTS)
def test_a_document_means_what_was_recorded(text: str) -> None:
    assert read_yaml(text, "f") == DOCUMENTS[text]


REFUSED = {
    "a: 1\na: 2": r"the key 'a' appears twice\n.*line 2, column 1",
    "x: &b {n: 4}\ny: {<<: *b, n: 2, n: 5}": r"the key 'n' appears twice\n.*line 2, column 19",
    "y: {<<: {a: 1}, <<: {b: 2}}": "the key '<<' appears twice",
    "{1: a, true: b}": "the key 'True' appears twice",
    "a: [1, 2": "line 1, column",
    "a:\n\tb: 1": "line 2, column 1",
    "a: *nowhere": "undefined alias",
    "a: 1\n---\nb: 2": "another document",
    "a: !!python/object:os.system x": "could not determine a constructor",
    "{[1]: a}": "unhashable",
    "a: \x07": "not allowed",
    "a: " + 2000 * "[": "nested too deeply",
    2000 * "{a: " + "1" + 2000 * "}": "nested too deeply",
}


def test_half_a_character_is_refused() -> None:
    with pytest.raises(InputError, match="the file holds half a character"):
        read_yaml('a: [b, {c: "x\\ud800"}]', "the file")


@pytest.mark.parametrize("text", REFUSED, ids=lambda text: text[:20])
def test_a_document_is_refused_with_its_place(text: str) -> None:
    with pytest.raises(InputError, match=REFUSED[text]) as caught:
        read_yaml(text, "the file")
    assert str(caught.value).startswith("the file is not valid YAML")


SHIPPED = sorted(
    [
        *asset("examples").rglob("*.yaml"),
        *(asset("examples").parent / "post_dist").rglob("*.yaml"),
    ]
)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_a_shipped_file_survives_a_round_trip(path: Path) -> None:
    values = read_yaml(path.read_text(), str(path))
    assert values
    assert read_yaml(write_yaml(values), "written again") == values
    assert list(read_yaml(write_yaml(values), "written again")) == list(values)


def test_every_shipped_file_is_among_them() -> None:
    names = {path.name for path in SHIPPED}
    assert {"demo.yaml", "70b.yaml", "published.yaml", "named_tasks.yaml", "hardware.yaml"} <= names
