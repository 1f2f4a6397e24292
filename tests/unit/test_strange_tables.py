"""Tables as strangers bring them: each row stays one row, and no message quotes one."""

import json
import random
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


def documents(path: Path) -> list[str]:
    """Read a file as a corpus, which has readers of its own."""
    section = Corpus(path=path)
    return [text for unit in units_of(section) for text in documents_of(section, unit)]


SPLITS = ("train", "validation", "test")


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_user_is_one_user_however_written(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    texts = [f"t{row}" for row in range(200)]
    users = [str(row // 4) for row in range(200)]
    written: list[object] = [f" {user}\t" if row % 2 else user for row, user in enumerate(users)]
    if suffix == ".jsonl":
        written = [float(user) if row % 2 else int(user) for row, user in enumerate(users)]
    table = pd.DataFrame({"text": texts, "label": "0", "who": pd.Series(written, dtype=object)})
    if suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, table.to_dict("records"))))
    elif suffix == ".csv":
        table.to_csv(path, index=False)
    else:
        table.to_parquet(path)
    section = task(path, user_column="who")
    user_of = dict(zip(texts, users, strict=True))
    found = [load_examples(section, split, "t") for split in SPLITS]
    people = [{user_of[text] for text in split.texts} for split in found]
    assert sum(map(len, people)) == len(set(users)), "all examples of a user are in one split"
    assert [len(set(split.users)) for split in found] == list(map(len, people))


def test_a_number_of_a_json_file_is_that_of_a_parquet_file(tmp_path: Path) -> None:
    rows = [{"text": number, "label": 1.0} for number in (3.0, -0.0, 2.5, 1e300, 7)]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    pd.DataFrame({"text": [3.0, -0.0, 2.5, 1e300, 7], "label": 1.0}).to_parquet(
        tmp_path / "a.parquet"
    )
    found = rows_of(path)
    assert found[:3] == [("3", "1"), ("0", "1"), ("2.5", "1")]
    assert found == rows_of(tmp_path / "a.parquet")
    assert documents(path) == [text for text, _ in found]
    assert read_column(path, "text", "t") == [text for text, _ in found]


@pytest.mark.parametrize(
    ("labels", "written"),
    [
        ({"0": ["bad"], "1": ["good"]}, [0, 1, 1.0, "1 ", "1.0"]),
        # Run files of earlier versions had the keys that the data had.
        ({0.0: ["bad"], 1.0: ["good"]}, [0.0, 1.0, 1, "1.0", " 1"]),
        ({"bad ": ["bad"], "good": ["good"]}, ["bad ", "good", "good ", "\tgood", "good"]),
        ({"v1.0": ["bad"], "v1": ["good"]}, ["v1.0", "v1", "v1 ", "v1", " v1"]),
        ({"good": ["bad"], "good ": ["good"]}, ["good", "good ", "good ", "good ", "good "]),
    ],
)
def test_a_label_is_that_of_the_run_file_however_written(
    tmp_path: Path, labels: dict, written: list[object]
) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"text": f"t{row}", "label": label} for row, label in enumerate(written)]
    path.write_text("\n".join(map(json.dumps, rows)))
    section = task(path, labels=labels, validation_share=0.0, test_share=0.0)
    assert load_examples(section, "train", "t").classes == [0, 1, 1, 1, 1]
    path.write_text(json.dumps({"text": "a", "label": "v2.0"}))
    with pytest.raises(InputError, match="row 1 has a label"):
        load_examples(section, "train", "t")


@pytest.mark.parametrize("suffix", SEPARATORS)
@pytest.mark.parametrize("row", ["secret", "secret\n1", "# secret", "\x1a"])
def test_a_row_too_short_is_named_by_its_line(tmp_path: Path, suffix: str, row: str) -> None:
    path = tmp_path / f"films{suffix}"
    rows = [SEPARATORS[suffix].join(film) for film in [("text", "label"), *FILMS]]
    rows[5:5] = ["", row]
    path.write_text("\n".join(rows))
    for read in (rows_of, documents, lambda path: read_column(path, "text", "texts")):
        with pytest.raises(InputError, match=r"line 7: fewer fields than the header has") as found:
            read(path)
        assert "secret" not in str(found.value)
        assert "write the separators of empty fields too" in str(found.value)


def test_a_blank_row_and_empty_fields_are_no_short_row(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,label,note\na,0,\n\n  \n,,\nb,1,\n")
    assert read_column(path, "text", "t") == ["a", "", "  ", "", "b"]
    assert documents(path) == ["a", "", "b"]


def test_a_tsv_file_with_quotes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    for text, problem in (
        ("good\nfilm", "line 3: fewer fields"),
        ("good\tfilm", "line 3: more fields"),
        ('a "good" film', "line 3: a field is quoted as in CSV"),
    ):
        table = pd.DataFrame({"text": ["first", text], "label": ["0", "1"]})
        table.to_csv(path, sep="\t", index=False)
        for read in (rows_of, documents):
            with pytest.raises(InputError, match=rf"{problem}[^\n]*\n.*name .*\.csv"):
                read(path)
        # The hint helps: a CSV file may have tabs.
        as_csv = path.with_suffix(".csv")
        as_csv.write_bytes(path.read_bytes())
        assert rows_of(as_csv) == [("first", "0"), (text, "1")]
        assert documents(as_csv) == ["first", text]


@pytest.mark.parametrize("line", ["sep=;", '"SEP=;"', "sep=|"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_separator_line_is_no_header(tmp_path: Path, line: str, end: str) -> None:
    path = tmp_path / "a.csv"
    separator = line.strip('"')[-1]
    rows = [separator.join(row) for row in [("text", "label"), *FILMS]]
    path.write_text("\ufeff" + end.join([line, *rows, ""]), encoding="utf-8", newline="")
    assert rows_of(path) == FILMS
    assert documents(path) == [text for text, _ in FILMS]
    path.write_text("\n".join([line, *rows, "secret"]))
    with pytest.raises(InputError, match="line 43: fewer fields"):
        rows_of(path)


def test_a_tsv_file_names_no_other_separator(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text("sep=\t\ntext\tlabel\na\t0\n")
    assert (rows_of(path), documents(path)) == ([("a", "0")], ["a"])
    path.write_text("sep=;\ntext;label\na;0\n")
    for read in (rows_of, documents):
        with pytest.raises(InputError, match=r"separator than tabs\n  name it .csv"):
            read(path)


def test_no_column_without_a_name_is_used(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    # pandas writes an index that way.
    pd.DataFrame(FILMS, columns=["text", "label"]).to_csv(path)
    assert list(read_table(path, "t").columns) == ["text", "label"]
    assert rows_of(path) == FILMS
    path.write_text(" ,\na,0\n")
    with pytest.raises(InputError, match="write the names of the columns into the first line"):
        read_table(path, "t")


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_name_of_a_column_may_hold_line_ends(tmp_path: Path, separator: str) -> None:
    path = tmp_path / "a.csv"
    name = 'my, "own"\ntext; here\r\nand here'
    table = pd.DataFrame(FILMS, columns=[name, "label"])
    table.to_csv(path, index=False, sep=separator)
    assert list(read_table(path, "t").columns) == [name, "label"]
    assert rows_of(path, text=f"{{{name}}}") == FILMS
    section = Corpus(path=path, text=f"{{{name}}}")
    (unit,) = units_of(section)
    assert list(documents_of(section, unit)) == [text for text, _ in FILMS]


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".txt"])
def test_utf_16_without_a_mark_is_no_utf_8(tmp_path: Path, suffix: str, encoding: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes("text\tlabel\nhello\t0\n".encode(encoding))
    for read in (lambda path: read_table(path, "t"), documents):
        with pytest.raises(InputError, match=r"is not UTF-8 text.*\n  save it as UTF-8"):
            read(path)


def test_a_damaged_parquet_file_is_an_input_error(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    columns = {
        "text": pyarrow.array([f"t{row}" for row in range(50)]),
        "label": pyarrow.array(["0", "1"] * 25).dictionary_encode(),
        "when": pyarrow.array(range(50), pyarrow.timestamp("us", tz="UTC")),
    }
    parquet.write_table(pyarrow.table(columns), path, compression="none")
    whole = path.read_bytes()
    generator = random.Random(1)
    refused = 0
    for _ in range(300):
        damaged = bytearray(whole)
        place = generator.randrange(len(whole) - 900, len(whole))
        damaged[place] = (damaged[place] + 2) % 256
        path.write_bytes(damaged)
        for read in (lambda path: read_table(path, "t"), documents):
            try:
                read(path)
            except InputError:
                refused += 1
    assert refused > 50


@pytest.mark.parametrize("suffix", SEPARATORS)
def test_a_text_may_have_any_length(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    text = "long " * 40_000 + "end"
    path.write_text(f"label{SEPARATORS[suffix]}text\n0{SEPARATORS[suffix]}{text}\n")
    assert rows_of(path) == [(text, "0")]
    assert documents(path) == [text]
