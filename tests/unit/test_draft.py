"""`post-dist init --data`: a run file for the owner's own table, which `check` accepts."""

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import tiny

import post_dist
from post_dist.artifacts.task import PromptTask
from post_dist.data.tasks import load_examples

TOPICS = ("Good", "Bad", "News & 'more'")


def write_table(path: Path, rows: int = 240, labels: tuple[str, ...] = TOPICS) -> Path:
    texts = [text for text, _ in tiny.sentences(rows, 1)]
    label = [labels[row % len(labels)] for row in range(rows)]
    pd.DataFrame({"id": range(rows), "body": texts, "topic_name": label}).to_csv(path, index=False)
    return path


def test_a_draft_with_a_model_is_accepted_and_its_words_are_tokens(
    tmp_path: Path, main: Callable
) -> None:
    data = write_table(tmp_path / "my tickets.csv")
    for family in ("llama", "roberta"):
        model = tiny.write_model(tmp_path / family, family)
        work = tmp_path / f"work {family}" / "deep"
        options = (f"--data={data}", "--text=body", "--label=topic_name", f"--model={model}")
        code, out, err = main("init", work, *options)
        assert code == 0, err
        run = work / "run.yaml"
        _, columns, check, tune = out.splitlines()
        assert columns == "text = body, label = topic_name"
        assert check.endswith("   lists what does not fit, and epsilon")
        # The folder has a space in its name, and the line is for a shell.
        assert shlex.split(check)[:3] == ["post-dist", "check", str(run)]
        assert shlex.split(tune)[:3] == ["post-dist", "tune", str(run)]
        code, out, err = main("check", run)
        assert code == 0, out + err
        assert "no conflicts: tune, evaluate" in out
        assert "not checked" not in out
        assert "epsilon 7.9" in out
        config = post_dist.load_run(run)
        task = config.private_task
        assert set(task.labels) == set(TOPICS)
        assert task.max_length == {"llama": 117, "roberta": 118}[family]
        assert config.privacy.declared_examples == 200
        template = {"llama": "{text}\nTopic name:", "roberta": "{text}\nTopic name: {mask}"}
        assert task.template == template[family]
        # What the file says of each word is what the tokenizer does.
        for line in run.read_text().splitlines():
            if "# token " in line:
                token = line.split("# token ")[1]
                assert token in out, line
        # A head gets the words that a prompt would start from. A masked model has none.
        has_head = config.tune.adapter == "head"
        assert has_head == (family == "llama")
        assert (config.tune.init_text is None) != has_head
        # Llama's tiny tokenizer is of bytes, as is RoBERTa's.
        assert "post_dist puts a space before each word: Ġ in its token." in run.read_text()


@pytest.mark.parametrize("stem", ["support_tickets.v2", "2026", "1_000", "1.5", "1e5", "_on"])
def test_a_run_keeps_the_name_of_its_table(tmp_path: Path, main: Callable, stem: str) -> None:
    data = write_table(tmp_path / f"{stem}.csv")
    work = tmp_path / "work"
    code, _, err = main("init", work, f"--data={data}", "--text=body", "--label=topic_name")
    assert code == 0, err
    config = post_dist.load_run(work / "run.yaml")
    assert (config.name, config.private_task.name) == (stem.lstrip("_"), stem.lstrip("_"))


def test_a_row_without_a_label_is_left_out(tmp_path: Path, main: Callable) -> None:
    data = write_table(tmp_path / "t.csv", rows=300, labels=("good", "", "bad", " "))
    options = (f"--data={data}", "--text=body", "--label=topic_name")
    code, _, err = main("init", tmp_path / "work", *options)
    assert code == 0, err
    config = post_dist.load_run(tmp_path / "work/run.yaml")
    task = config.private_task
    assert set(task.labels) == {"good", "bad"}
    assert config.privacy.declared_examples == 200
    texts = [
        text
        for split in ("train", "validation", "test")
        for text in load_examples(task, split, "private_task").texts
    ]
    assert set(texts) == set(pd.read_csv(data).loc[lambda t: t.topic_name.isin(task.labels)].body)


def test_labels_that_begin_alike_get_letters_and_a_start_that_names_them(
    tmp_path: Path, main: Callable
) -> None:
    labels = ("xxqz1", "xxqz2", "xxqz3")
    data = write_table(tmp_path / "t.csv", labels=labels)
    model = tiny.write_model(tmp_path / "llama", "llama", unused=3)
    tokenizer = tiny.tokenizer("llama")
    tokenizer.add_tokens([" A", " B", " C"])
    tokenizer.save_pretrained(model)
    options = (f"--data={data}", "--text=body", "--label=topic_name", f"--model={model}")
    code, _, err = main("init", tmp_path / "work", *options)
    assert code == 0, err
    run = tmp_path / "work/run.yaml"
    config = post_dist.load_run(run)
    assert list(config.private_task.labels.values()) == [("A",), ("B",), ("C",)]
    assert "# Letters, because labels begin with the same token" in run.read_text()
    # Letters do not name the classes.
    assert config.tune.init_text == "Predict if this text is xxqz1 (A), xxqz2 (B) or xxqz3 (C)"
    code, out, err = main("check", run)
    assert code == 0, out + err


def test_a_tokenizer_that_knows_neither_labels_nor_letters_is_refused_with_a_way_out(
    tmp_path: Path, main: Callable
) -> None:
    # The tokenizer splits each of these words behind the space before it.
    data = write_table(tmp_path / "t.csv", labels=("HIV", "cold", "xflu"))
    model = tiny.write_model(tmp_path / "llama", "llama")
    work = tmp_path / "work"
    options = (f"--data={data}", "--text=body", "--label=topic_name")
    code, _, err = main("init", work, *options, f"--model={model}")
    assert code == 2
    assert "no first token of its own for each label, nor for each of the letters A to C" in err
    assert not work.exists()
    # What the hint says leads to a run file that `check` accepts.
    code, _, err = main("init", work, *options)
    assert code == 0, err
    run = work / "run.yaml"
    inputs = (f"--set=inputs.student={model}", "--set=inputs.trust_model=true")
    inputs += ("--set=private_task.max_length=100",)
    code, out, _ = main("check", run, *inputs)
    assert code == 2
    assert "share the token" in out
    text = run.read_text()
    for word, better in (("hiv", "film"), ("cold", "good"), ("xflu", "bad")):
        text = text.replace(f'["{word}"]', f'["{better}"]')
    run.write_text(text)
    code, out, err = main("check", run, *inputs)
    assert code == 0, out + err


def test_without_a_model_labels_that_differ_in_case_keep_it(tmp_path: Path, main: Callable) -> None:
    data = write_table(tmp_path / "t.csv", labels=("b", "B"))
    options = (f"--data={data}", "--text=body", "--label=topic_name")
    code, _, err = main("init", tmp_path / "work", *options)
    assert code == 0, err
    labels = post_dist.load_run(tmp_path / "work/run.yaml").private_task.labels
    assert {label: list(words) for label, words in labels.items()} == {"b": ["b"], "B": ["B"]}


def write_rare(path: Path, rare: list[tuple[str, str]], **columns: list[str]) -> Path:
    """A table of 240 texts with two labels, and of rows of rare ones, with further columns."""
    texts = [text for text, _ in tiny.sentences(240, 1)]
    rows = [(text, ("bad", "good")[row % 2]) for row, text in enumerate(texts)] + rare
    table = pd.DataFrame(rows, columns=["body", "diagnosis"])
    table.assign(**columns).to_csv(path, index=False)
    return path


def test_a_label_that_few_have_is_published_only_if_the_owner_says_so(
    tmp_path: Path, main: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    # Equal texts are one example, and a text that is missing is none.
    rare = [("seen once", "HIV")] * 12 + [(" ", "gout")] * 12
    # A text with two labels is none either.
    rare += [(f"sighted {row}", label) for row in range(12) for label in ("good", "lupus")]
    rare += [(f"seen {row}", "mumps") for row in range(9)]
    rare += [(f"saw {row}", "film") for row in range(10)]
    data = write_rare(tmp_path / "t.csv", rare)
    model = tiny.write_model(tmp_path / "llama", "llama")
    options = (f"--data={data}", "--text=body", "--label=diagnosis", f"--model={model}")
    code, out, err = main("init", tmp_path / "work", *options)
    assert code == 0, err
    said = out + err + caplog.text
    assert "labels that fewer than 10 different texts have: 3. A name would tell" in said
    assert not any(word in said for word in ("HIV", "gout", "lupus", "mumps", "seen"))
    run = tmp_path / "work/run.yaml"
    config = post_dist.load_run(run)
    assert set(config.private_task.labels) == {"bad", "film", "good"}
    assert not any(label in str(config.tune.init_text) for label in ("HIV", "lupus", "mumps"))
    assert "gout" not in run.read_text(), "no stage reads a row without a text"
    # No row is dropped: they are refused until the owner has decided.
    code, out, _ = main("check", run)
    assert code == 2
    assert "has a label in column 'diagnosis' that is not in private_task.labels" in out
    text = run.read_text()
    for label, word in (("HIV", "story"), ("lupus", "cast"), ("mumps", "music")):
        assert f'    # "{label}": []\n' in text
        text = text.replace(f'# "{label}": []', f'"{label}": ["{word}"]')
    run.write_text(text)
    code, out, err = main("check", run)
    assert code == 0, out + err


def test_a_label_of_few_users_is_rare_however_many_texts_they_have(
    tmp_path: Path, main: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    rare = [(f"seen {row}", "HIV") for row in range(60)]
    users = [f"u{row}" for row in range(240)] + [f"v{row % 9}" for row in range(60)]
    data = write_rare(tmp_path / "t.csv", rare, user=users)
    options = (f"--data={data}", "--text=body", "--label=diagnosis", "--user=user")
    code, _, err = main("init", tmp_path / "work", *options)
    assert code == 0, err
    assert "labels that fewer than 10 users have: 1." in err + caplog.text
    labels = post_dist.load_run(tmp_path / "work/run.yaml").private_task.labels
    assert set(labels) == {"bad", "good"}


def test_common_labels_are_published_without_a_warning(
    tmp_path: Path, main: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    data = write_rare(tmp_path / "t.csv", [])
    options = (f"--data={data}", "--text=body", "--label=diagnosis")
    code, out, err = main("init", tmp_path / "work", *options)
    assert code == 0, err
    assert "fewer" not in err + caplog.text + (tmp_path / "work/run.yaml").read_text()
    assert "it holds your labels and your table's rounded size, as the prompt will" in out


def test_a_user_column_makes_the_numbers_count_users(tmp_path: Path, main: Callable) -> None:
    data = write_table(tmp_path / "t.csv", rows=1500)
    table = pd.read_csv(data)
    table["user"] = [f"u{row // 4}" for row in range(1500)]
    table.to_csv(data, index=False)
    options = (f"--data={data}", "--text=body", "--label=topic_name", "--user=user")
    code, _, err = main("init", tmp_path / "work", *options)
    assert code == 0, err
    run = tmp_path / "work/run.yaml"
    config = post_dist.load_run(run)
    assert config.private_task.user_column == "user"
    # 80% of 375 users, and a tenth of that.
    assert config.privacy.declared_examples == 300
    assert config.privacy.expected_batch_size == 30
    assert "The number of training users is private. This is 80% of the users" in run.read_text()
    code, out, err = main("check", run)
    assert code == 0, out + err
    table["user"] = [f"u{row % 90}" for row in range(1500)]
    table.to_csv(data, index=False)
    code, _, err = main("init", tmp_path / "few", *options)
    assert (code, "fewer than 100 users with a label" in err) == (2, True), err


def test_true_and_false_answer_the_question_of_their_column(tmp_path: Path, main: Callable) -> None:
    data = write_table(tmp_path / "t.csv", labels=("True", "False"))
    table = pd.read_csv(data).rename(columns={"topic_name": "is_urgent"})
    for name, question, words in (
        ("is_urgent", "{text}\nIs urgent?", {"True": ("yes",), "False": ("no",)}),
        ("label", "{text}\nAnswer:", {"True": ("true",), "False": ("false",)}),
    ):
        table.rename(columns={"is_urgent": name}).to_csv(data, index=False)
        options = (f"--data={data}", "--text=body", f"--label={name}")
        code, _, err = main("init", tmp_path / name, *options)
        assert code == 0, err
        run = tmp_path / name / "run.yaml"
        task = post_dist.load_run(run).private_task
        assert (task.template, dict(task.labels)) == (question, words)
        assert "Letters" not in run.read_text()


@pytest.mark.parametrize(("rows", "noise"), [(2500, None), (2600, 20)])
def test_a_large_table_is_compared_with_the_start(
    tmp_path: Path, main: Callable, rows: int, noise: float | None
) -> None:
    data = write_table(tmp_path / "t.csv", rows=rows)
    options = (f"--data={data}", "--text=body", "--label=topic_name")
    code, _, err = main("init", tmp_path / "work", *options)
    assert code == 0, err
    config = post_dist.load_run(tmp_path / "work/run.yaml")
    assert config.tune.comparison_noise_multiplier == noise


@pytest.mark.parametrize("preset", ["laptop", "gpu", "cluster", "paper"])
def test_every_preset_is_accepted(tmp_path: Path, main: Callable, preset: str) -> None:
    data = write_table(tmp_path / "t.csv", rows=1200)
    options = (f"--data={data}", "--text=body", "--label=topic_name", f"--preset={preset}")
    code, _, err = main("init", tmp_path / "work", *options)
    assert code == 0, err
    config = post_dist.load_run(tmp_path / "work/run.yaml")
    assert config.tune.num_virtual_tokens == (100 if preset == "paper" else 10)
    assert (config.tune.init_text is None) == (preset == "paper"), "a head gets words in front"
    is_paper = preset == "paper"
    assert config.tune.adapter == ("prompt" if is_paper else "head")
    assert config.privacy.steps == (625 if is_paper else 400)
    assert config.privacy.expected_batch_size == (32 if is_paper else 100)
    assert config.privacy.learning_rate == (1e-3 if is_paper else None)
    assert config.cluster.gpus_per_node == (preset == "cluster")


@pytest.mark.parametrize("order", [["body", "topic_name"], ["topic_name", "body"]])
def test_a_table_of_two_columns_needs_no_names(
    tmp_path: Path, main: Callable, order: list[str]
) -> None:
    data = write_table(tmp_path / "t.csv")
    pd.read_csv(data)[order].to_csv(data, index=False)
    code, _, err = main("init", tmp_path / "work", f"--data={data}")
    assert code == 0, err
    task = post_dist.load_run(tmp_path / "work/run.yaml").private_task
    assert (task.text, task.label_column) == ("{body}", "topic_name")


def write_rows(path: Path, header: str, rows: list[tuple[str, str]]) -> Path:
    path.write_text("".join(f"{first},{second}\n" for first, second in [header.split(","), *rows]))
    return path


LONG = ("a long name of a class", "an even longer name of a class")


@pytest.mark.parametrize(
    ("header", "text", "label"),
    [
        ("text,mood", "text", "mood"),
        ("note,Label", "note", "Label"),
        # No name tells. A task has no class for each of 200 values.
        ("note,mood", "note", "mood"),
    ],
)
@pytest.mark.parametrize("turned", [False, True])
def test_texts_that_are_shorter_than_their_labels_are_texts(
    tmp_path: Path, main: Callable, header: str, text: str, label: str, *, turned: bool
) -> None:
    # The missing cells of the labels are no labels, and have no length.
    rows = [(f"t{row}", LONG[row % 2] if row < 150 else "") for row in range(200)]
    names = header.split(",")
    if turned:
        names, rows = names[::-1], [row[::-1] for row in rows]
    data = write_rows(tmp_path / "t.csv", ",".join(names), rows)
    code, out, err = main("init", tmp_path / "work", f"--data={data}")
    assert code == 0, err
    assert f"text = {text}, label = {label}" in out.splitlines()
    task = post_dist.load_run(tmp_path / "work/run.yaml").private_task
    assert (task.text, task.label_column, set(task.labels)) == (f"{{{text}}}", label, set(LONG))


def test_a_column_named_text_never_becomes_the_labels(tmp_path: Path, main: Callable) -> None:
    rows = [(f"t{n % 20}", LONG[n % 2]) for n in range(400)]
    data = write_rows(tmp_path / "t.csv", "text,label", rows)
    code, _, err = main("init", tmp_path / "work", f"--data={data}")
    assert (code, "fewer than 100 different texts with a label" in err) == (2, True), err
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("different", [20, 200])
def test_two_columns_that_cannot_be_told_apart_are_refused(
    tmp_path: Path, main: Callable, different: int
) -> None:
    rows = [(f"secret {n % different}", f"a longer secret {n % different}") for n in range(200)]
    data = write_rows(tmp_path / "t.csv", "note,reply", rows)
    code, out, err = main("init", tmp_path / "work", f"--data={data}")
    assert (code, out) == (2, "")
    assert "has the columns note, reply, and neither names nor values tell" in err
    assert "secret" not in err
    assert not (tmp_path / "work").exists()


def test_init_says_which_columns_it_has_named(tmp_path: Path, main: Callable) -> None:
    users = [f"u{row}" for row in range(240)]
    data = write_rare(tmp_path / "t.csv", [], user=users)
    options = (f"--data={data}", "--text=body", "--label=diagnosis", "--user=user")
    code, out, err = main("init", tmp_path / "work", *options)
    assert code == 0, err
    assert "text = body, label = diagnosis, user = user" in out.splitlines()
    code, out, err = main("init", tmp_path / "other", *options, "--json")
    assert code == 0, err
    columns = {"text": "body", "label": "diagnosis", "user": "user"}
    assert json.loads(out)["columns"] == columns


@pytest.mark.parametrize("name", ["t.csv", "t.txt", "t.jsonl"])
@pytest.mark.parametrize("options", [(), ("--text=a|b", "--label=a|b")])
def test_a_table_of_one_column_has_no_labels(
    tmp_path: Path, main: Callable, name: str, options: tuple[str, ...]
) -> None:
    # Texts that many have would pass for labels.
    rows = [f"secret {n % 9}|{n % 2}" for n in range(200)]
    data = tmp_path / name
    if name == "t.jsonl":
        data.write_text("".join(json.dumps({"a|b": row}) + "\n" for row in rows))
    else:
        data.write_text("\n".join(["a|b", *rows]))
    code, out, err = main("init", tmp_path / "work", f"--data={data}", *options)
    assert (code, out) == (2, "")
    assert f"{name} has one column, and a table needs texts and labels" in err
    assert "separate it by commas, semicolons or tabs" in err
    assert "secret" not in err
    assert not (tmp_path / "work").exists()


def test_only_what_the_stages_use_counts(tmp_path: Path, main: Callable) -> None:
    rows = [(f"text {n}", ("good", "bad")[n % 2]) for n in range(105)]
    # 2,000 rows of five texts, 30 without a text, and 20 texts with two labels.
    rows += [(f"text {n % 5}", ("good", "bad")[n % 5 % 2]) for n in range(2000)]
    rows += [("", "gout")] * 30
    rows += [("text 0", " good ")]
    rows += [(f"double {n}", label) for n in range(20) for label in ("good", "bad")]
    data = write_rows(tmp_path / "t.csv", "text,label", rows)
    code, _, err = main("init", tmp_path / "work", f"--data={data}")
    assert code == 0, err
    config = post_dist.load_run(tmp_path / "work/run.yaml")
    task = config.private_task
    splits = ("train", "validation", "test")
    kept = [load_examples(task, split, "private_task").texts for split in splits]
    assert sum(map(len, kept)) == 105
    # 80% of the 105, rounded up to one digit.
    assert config.privacy.declared_examples == 90
    assert set(task.labels) == {"good", "bad"}
    written = (tmp_path / "work/run.yaml").read_text()
    assert not re.search(r'gout|" good "', written)
    # Six texts more with two labels leave 99.
    rows += [(f"text {n}", ("bad", "good")[n % 2]) for n in range(10, 16)]
    data = write_rows(tmp_path / "few.csv", "text,label", rows)
    code, _, err = main("init", tmp_path / "few", f"--data={data}")
    assert (code, "fewer than 100 different texts with a label" in err) == (2, True), err


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_header_between_the_rows_is_named_by_its_row(
    tmp_path: Path, main: Callable, mark: str
) -> None:
    rows = [(f"secret {n}", ("good", "bad")[n % 2]) for n in range(300)]
    rows.insert(120, (f"{mark}note", "mood"))
    data = write_rows(tmp_path / "t.csv", "note,mood", rows)
    code, _, err = main("init", tmp_path / "work", f"--data={data}")
    assert code == 2
    assert "row 121 of t.csv repeats the header\n  delete the row" in err
    assert "secret" not in err
    # What the hint says is enough.
    del rows[120]
    data = write_rows(tmp_path / "t.csv", "note,mood", rows)
    code, _, err = main("init", tmp_path / "work", f"--data={data}")
    assert code == 0, err


def test_a_class_may_be_called_as_a_column_is_by_default(tmp_path: Path, main: Callable) -> None:
    data = write_table(tmp_path / "t.csv", labels=("label", "parcel", "text"))
    options = (f"--data={data}", "--text=body", "--label=topic_name")
    code, _, err = main("init", tmp_path / "work", *options)
    assert code == 0, err
    config = post_dist.load_run(tmp_path / "work/run.yaml")
    assert set(config.private_task.labels) == {"label", "parcel", "text"}
    assert config.tune.init_text == "Predict if this text is label, parcel or text"
    code, out, err = main("check", tmp_path / "work/run.yaml")
    assert code == 0, out + err


@pytest.mark.parametrize(
    ("label", "fault"),
    [
        ("secret\u00a0!", "NO-BREAK SPACE (U+00A0) at position 7"),
        ("secret\x07", "a control character (U+0007) at position 7"),
        ("secret\u200d", "ZERO WIDTH JOINER (U+200D) at position 7"),
        ("secret" * 17, "has more than 100 characters"),
    ],
)
def test_a_label_that_cannot_be_handed_on_is_named_by_its_fault(
    tmp_path: Path, main: Callable, label: str, fault: str
) -> None:
    data = write_table(tmp_path / "t.csv", labels=("good", label))
    options = (f"--data={data}", "--text=body", "--label=topic_name")
    code, _, err = main("init", tmp_path / "work", *options)
    assert code == 2
    assert "--label: the value of column 'topic_name' in row 2 has" in err
    assert fault in err
    assert "secret" not in err
    assert not (tmp_path / "work").exists()


def test_labels_of_persian_words_and_composed_emoji_are_accepted(
    tmp_path: Path, main: Callable
) -> None:
    labels = (
        "\u0646\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
        "\U0001f469\u200d\U0001f680",
    )
    data = write_table(tmp_path / "t.csv", labels=labels)
    options = (f"--data={data}", "--text=body", "--label=topic_name")
    code, _, err = main("init", tmp_path / "work", *options)
    assert code == 0, err
    run = tmp_path / "work/run.yaml"
    task = post_dist.load_run(run).private_task
    assert set(task.labels) == set(labels)
    assert {word for words in task.labels.values() for word in words} == set(labels)
    code, out, err = main("check", run)
    assert code == 0, out + err


def test_a_draft_without_a_model_is_accepted(tmp_path: Path, main: Callable) -> None:
    data = write_table(tmp_path / "t.csv", labels=("0", "1"))
    work = tmp_path / "work"
    code, out, err = main("init", work, f"--data={data}", "--text=body", "--label=topic_name")
    assert code == 0, err
    assert "it names no model to tune on yet" in out
    code, out, err = main("check", work / "run.yaml")
    assert code == 0, out + err
    code, _, err = main("tune", work / "run.yaml")
    assert (code, "names no student\n  an owner gives its folder" in err) == (2, True), err
    assert main("init", work, f"--data={data}", "--text=body", "--label=topic_name")[0] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            (),
            "t.csv has the columns id, body, topic_name\n  name two of them, perhaps --text 'body'",
        ),
        (("--text=body",), "--label 'topic_name'"),
        (("--text=topic_name",), "perhaps --text 'topic_name' --label 'id'"),
        (("--label=body",), "perhaps --text 'topic_name' --label 'body'"),
        (("--text=body", "--user=topic_name"), "--text 'body' --label 'id'"),
        (("--text=body", "--label=body"), "--text and --label name the same column"),
        (("--text=body", "--label=id", "--user=id"), "--label and --user name the same column"),
        (("--text=id", "--user=id"), "--text and --user name the same column"),
        (
            ("--data={two}", "--text=note", "--user=mood"),
            "two.csv has the columns note, mood\n  add a column: texts, labels and users",
        ),
        (("--text=none", "--label=topic_name"), "has no column 'none'\n  columns: id, body"),
        (
            ("--text=body", "--label=topic_name", "--user=none"),
            "--user: t.csv has no column 'none'\n  columns: id, body",
        ),
        (("--text=body", "--label=id"), "has 240 different values, and a task has 2 to 50"),
        (("--text=body", "--label=topic_name", "--model=org/name"), "hf download"),
        (("--text=body", "--label=topic_name", "--data={few}"), "fewer than 100 different texts"),
        (("--text=body", "--label=topic_name", "--data={gap}"), "has 1 different values"),
        (
            ("--text=body", "--label=topic_name", "--data={rare}"),
            "fewer than 2 values of column 'topic_name' have 10 different texts or more",
        ),
        (("--data={none}",), "No such file"),
        (("--data={nohead}",), "the first line seems to be an example"),
        (("--data={nohead}", "--text=body", "--label=topic"), "write a line with the names"),
        (("--data={header}",), "header.csv has no rows"),
    ],
)
def test_wrong_input_leaves_nothing(
    tmp_path: Path, main: Callable, options: tuple[str, ...], message: str
) -> None:
    tables = {
        "few": write_table(tmp_path / "few.csv", rows=90),
        "gap": write_table(tmp_path / "gap.csv", labels=("secret", " ")),
        "rare": write_table(tmp_path / "rare.csv", labels=("flu",) * 30 + ("secret",)),
        "two": write_rows(tmp_path / "two.csv", "note,mood", [("secret", "1")] * 200),
        "none": tmp_path / "none.csv",
        "nohead": tmp_path / "nohead.csv",
        "header": write_table(tmp_path / "header.csv", rows=0),
    }
    tables["nohead"].write_text("1,the secret of a film,0\n2,another secret of one,1\n")
    data = write_table(tmp_path / "t.csv")
    given = [option.format(**tables) for option in options]
    code, out, err = main("init", tmp_path / "work", f"--data={data}", *given)
    assert (code, out) == (2, "")
    assert message in err
    assert "secret" not in err
    assert not (tmp_path / "work").exists()


def test_options_of_a_table_need_one(tmp_path: Path, main: Callable) -> None:
    code, _, err = main("init", tmp_path / "work", "--text=body")
    assert code == 2
    assert "give it with --data" in err
    assert not (tmp_path / "work").exists()


def test_no_default_speaks_of_sentiment(tmp_path: Path) -> None:
    config = post_dist.load_run(tiny.write_run(tmp_path))
    assert config.tune.init_text is None
    task = PromptTask.of_section(config.private_task, config.tune.init_text)
    assert task.init_text == "Predict if this text is bad or good"
