"""Tables as strangers bring them: each row stays one row, and no message quotes one."""

import json
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from pydantic import ValidationError

from post_dist.config.sources import Corpus, Task
from post_dist.data.corpus_files import units_of
from post_dist.data.documents import documents_of
from post_dist.data.sources import compose_texts, read_column, read_rows, read_table
from post_dist.data.tasks import load_examples
from post_dist.errors import InputError

WORDS = {"0": ["bad"], "1": ["good"]}


def task(path: Path, **fields: object) -> Task:
    base = {"name": "t", "visibility": "private", "path": path, "template": "{text} was"}
    return Task.model_validate(base | {"labels": WORDS} | fields)


def rows_of(path: Path, **fields: object) -> list[tuple[str, str]]:
    section = task(path, **fields)
    rows = read_rows(section, "train", "private_task", section.label_column)
    return list(zip(rows.texts, rows.answers, strict=True))


def test_only_the_header_decides_the_separator_whatever_ends_the_lines(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    lines = ["text,label", *(f"a film; with; many; marks {row},1" for row in range(5))]
    for end in ("\n", "\r\n", "\r"):
        path.write_bytes(end.join([*lines, ""]).encode())
        assert list(read_table(path, "t").columns) == ["text", "label"]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_a_row_without_a_response_is_left_out(tmp_path: Path, suffix: str) -> None:
    rows = [{"text": f"film {row}", "reply": "fine" if row % 5 else None} for row in range(100)]
    path = tmp_path / f"t{suffix}"
    table = pd.DataFrame(rows)
    if suffix == ".csv":
        table.to_csv(path, index=False)
    else:
        table.to_json(path, orient="records", lines=True)
    section = Task.model_validate(
        {"name": "t", "visibility": "private", "path": path, "template": "{text} was"}
        | {"response_column": "reply"}
    )
    found = load_examples(section, "train", "private_task")
    assert len(found.texts) > 50
    assert set(found.responses) == {"fine"}


FILMS = [(f"film {number} is fine", str(number % 2)) for number in range(40)]
SEPARATORS = {".csv": ",", ".tsv": "\t"}


@pytest.mark.parametrize("suffix", SEPARATORS)
@pytest.mark.parametrize("at", [0, 7, 39])
@pytest.mark.parametrize("others", ['"Dull film" he said', 'a 6" screen', '""', 'say "no"'])
def test_a_stray_quote_takes_no_other_rows_away(
    tmp_path: Path, suffix: str, at: int, others: str
) -> None:
    """A program without quoting has written the file."""
    rows = list(FILMS)
    rows[20] = (others, "1")
    rows.insert(at, ('"Awful film said my wife', "0"))
    path = tmp_path / f"films{suffix}"
    lines = [SEPARATORS[suffix].join(row) for row in [("text", "label"), *rows]]
    path.write_text("\n".join(lines) + "\n")
    if suffix == ".tsv":
        assert rows_of(path) == rows
        return
    with pytest.raises(InputError, match=r"films.csv, line \d+: a quote is in") as refused:
        rows_of(path)
    assert "film" not in str(refused.value).replace("films.csv", "")


@given(
    st.lists(
        st.tuples(st.text(st.sampled_from('a ",;\n\r\t'), max_size=6), st.sampled_from("01")),
        min_size=1,
        max_size=8,
    ),
    st.sampled_from([",", ";"]),
)
@settings(deadline=None)
def test_what_pandas_has_quoted_is_read_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]], separator: str
) -> None:
    path = tmp_path_factory.mktemp("quoted") / "a.csv"
    # Python's csv module quotes a lone carriage return, and pandas does not.
    rows = [(text.replace("\r", ""), label) for text, label in rows]
    pd.DataFrame(rows, columns=["text", "label"]).to_csv(path, index=False, sep=separator)
    table = read_table(path, "t")
    assert list(zip(table["text"], table["label"], strict=True)) == rows


def test_rows_do_not_shift(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text\ngood film\n\nbad film\n")
    assert read_column(path, "text", "texts") == ["good film", "", "bad film"]
    path.write_text("\ufefftext\ngood film\nbad film\n\n\n", encoding="utf-8")
    assert read_column(path, "text", "texts") == ["good film", "bad film"]
    # An empty text that was written is a text.
    path.write_text('text\ngood film\n""\n')
    assert read_column(path, "text", "texts") == ["good film", ""]
    (tmp_path / "a.jsonl").write_text('{"text": ["a", "b"]}\n')
    with pytest.raises(InputError, match="holds lists or mappings"):
        read_column(tmp_path / "a.jsonl", "text", "texts")


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.parquet"])
def test_two_columns_of_one_name_are_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    separator = "\t" if name == "a.tsv" else ","
    path.write_text("text,label,text\na,0,b\n".replace(",", separator))
    problem = "two columns have the same name"
    if name == "a.jsonl":
        path.write_text('{"text": "a", "label": 0, "text": "b"}\n')
        problem = "an object has one key twice"
    if name == "a.parquet":
        columns = [pyarrow.array(values) for values in (["a"], ["0"], ["b"])]
        table = pyarrow.Table.from_arrays(columns, ["text", "label", "text"])
        parquet.write_table(table, path)
    with pytest.raises(InputError, match=f"{name}: {problem}"):
        rows_of(path)
    # A corpus is read in pieces, by readers of its own.
    section = Corpus(path=path)
    with pytest.raises(InputError, match=f"{name}.*: {problem}"):
        [list(documents_of(section, unit)) for unit in units_of(section)]


def test_columns_without_a_name_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,label,,\na,0,,\n")
    section = Corpus(path=path)
    assert rows_of(path) == [("a", "0")]
    assert [list(documents_of(section, unit)) for unit in units_of(section)] == [["a"]]


def test_a_file_without_a_header_is_not_quoted(tmp_path: Path, main: Callable) -> None:
    path = tmp_path / "notes.csv"
    path.write_text("Anna Smith is ill,1\nBob is well,0\nEve is ill,1\n")
    with pytest.raises(InputError, match="has no column 'text' among 2 columns") as refused:
        read_column(path, "text", "texts")
    assert "Anna" not in str(refused.value)
    # The name of the label column would be the label of the first person.
    code, _, err = main("init", tmp_path / "work", f"--data={path}")
    assert (code, "the first line seems to be an example" in err) == (2, True)
    with pytest.raises(ValidationError, match="is also one of the labels"):
        task(path, label_column="1")


@pytest.mark.parametrize("name", ["0", "review.text", "a[0]", "text of it"])
def test_a_name_of_a_column_is_taken_as_it_is(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a.csv"
    pd.DataFrame([("fine", "1")], columns=[name, "label"]).to_csv(path, index=False)
    section = task(path, text="{{" + "{" + name + "}" + "}} end")
    table = read_table(path, "t")
    assert compose_texts(section, table) == ["{fine} end"]


@pytest.mark.parametrize("text", ["{text!x}", "{text:d}", "{text:{label}}"])
def test_a_format_in_a_text_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValidationError, match="has a name with ':' or '!'"):
        task(tmp_path / "a.csv", text=text)


def test_only_a_column_that_is_used_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tweets.parquet"
    columns = {
        "id": pyarrow.array([2**60, 2**60 + 1]),
        "image": pyarrow.array([b"\xff\xd8", b"\xff"]),
        "text": pyarrow.array(["café".encode(), b"tea"]),
        "label": pyarrow.array(["0", "1"]),
    }
    parquet.write_table(pyarrow.table(columns), path)
    assert rows_of(path) == [("café", "0"), ("tea", "1")]
    with pytest.raises(InputError, match="column 'id' holds whole numbers above 2\\^53"):
        rows_of(path, text="{id}")
    with pytest.raises(InputError, match="column 'image' holds bytes that are not UTF-8 text"):
        rows_of(path, text="{image}")


def test_half_a_character_in_a_corpus_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [
        json.dumps({"text": "a"}),
        '{"text": "broken \\uD83D here"}',
        '{"text": "\\ud83d\\ude00"}',
    ]
    path.write_text("\n".join([lines[0], lines[2]]))
    section = Corpus.model_validate({"path": path})
    (unit,) = units_of(section)
    assert list(documents_of(section, unit)) == ["a", "\U0001f600"]
    path.write_text("\n".join(lines))
    (unit,) = units_of(section)
    with pytest.raises(InputError, match="line 2, holds half a character"):
        list(documents_of(section, unit))


@pytest.mark.parametrize("suffix", [".jsonl", ".txt", ".csv"])
def test_a_byte_order_mark_is_no_text(tmp_path: Path, suffix: str) -> None:
    contents = {".jsonl": '{"text": "a"}\n', ".txt": "a\n", ".csv": "text\na\n"}[suffix]
    path = tmp_path / f"a{suffix}"
    path.write_text("\ufeff" + contents, encoding="utf-8")
    assert read_column(path, "text", "t") == ["a"]
    section = Corpus.model_validate({"path": path})
    (unit,) = units_of(section)
    assert list(documents_of(section, unit)) == ["a"]


def test_a_wrong_label_is_named_by_its_row(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"text": None, "label": "0"}, {"text": "a", "label": "0"}, {"text": "b", "label": "5"}]
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(InputError, match="row 3 has a label"):
        load_examples(task(path), "train", "private_task")
    path.write_text(json.dumps(rows, indent=1))
    with pytest.raises(InputError, match="one JSON object on each line"):
        read_table(path, "private_task")


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_rows_without_a_user_are_left_out(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    users = ["" if row % 2 else f"u{row}" for row in range(40)]
    table = pd.DataFrame(
        {"text": [f"t{row}" for row in range(40)], "label": ["0", "1"] * 20, "who": users}
    )
    if suffix == ".csv":
        table.to_csv(path, index=False)
    else:
        table["who"] = table["who"].where(table["who"] != "", None)
        table.to_json(path, orient="records", lines=True)
    section = task(path, user_column="who")
    found = [load_examples(section, split, "t") for split in ("train", "validation", "test")]
    assert sum(len(split.texts) for split in found) == 20
    assert all(len(set(split.users or [])) == len(split.texts) for split in found)
