"""Predictions with a prompt on its model: inputs, formats, refusals, and what never is printed."""

import csv
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import served
import tiny
import torch

import post_dist
from post_dist.artifacts.head import LinearHead
from post_dist.config.label_names import label_fault
from post_dist.data.template import Batch, Template
from post_dist.errors import ArtifactRefused, InputError
from post_dist.files import digest_of, file_digests
from post_dist.serving.texts import read_texts

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAI" + "A" * 43
TEXTS = ["the film is lovely", "", 'the plot, "it" is dull and\u2028long ' * 3, "secret 7"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return served.write_model(tmp_path_factory.mktemp("served") / "model")


@pytest.fixture
def prompt(tmp_path: Path, model: Path) -> Path:
    return served.write_prompt(tmp_path / "prompt", model)


def test_every_input_and_format_gives_the_same_answers_in_order(
    tmp_path: Path, model: Path, prompt: Path, main: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictions = post_dist.load_prompt(prompt).predict(TEXTS, model, precision="fp32")
    assert len({each.scores["no"] for each in predictions}) == len(TEXTS)
    wanted = []
    for each in predictions:
        assert (each.label, list(each.scores)) == (("no", "yes")[each.index], ["no", "yes"])
        assert sum(each.scores.values()) == pytest.approx(1)
        # The command line prints four digits of a score.
        printed = {name: float(f"{score:.4g}") for name, score in each.scores.items()}
        assert printed != each.scores
        wanted.append((each.label, each.index, printed))

    table = pd.DataFrame({"body": TEXTS, "other": "x"})
    table.to_csv(tmp_path / "t.csv", index=False)
    table.to_parquet(tmp_path / "t.parquet")
    table.to_json(tmp_path / "t.jsonl", orient="records", lines=True)
    lines = "".join(f"{text}\n" for text in TEXTS)
    (tmp_path / "t.txt").write_text(lines)
    options = (f"--model={model}", "--precision=fp32")
    answers = set()
    for name in ("t.csv", "t.parquet", "t.jsonl", "t.txt", "-"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
        more = () if name in ("t.txt", "-") else ("--column=body",)
        source = name if name == "-" else tmp_path / name
        code, out, err = main("predict", prompt, source, *options, *more)
        assert code == 0, err
        answers.add(out)
    (only,) = answers
    found = [json.loads(line) for line in only.splitlines()]
    assert [(each["label"], each["index"], each["scores"]) for each in found] == wanted

    code, out, err = main("predict", prompt, tmp_path / "t.txt", *options, "--format=csv")
    header, *rows = csv.reader(io.StringIO(out))
    assert header == ["label", "index", "score no", "score yes"]
    for (label, index, scores), row in zip(wanted, rows, strict=True):
        assert row[:2] == [label, str(index)]
        assert [float(cell) for cell in row[2:]] == list(scores.values())

    # One text a batch gives the same, but for rounding.
    alone = post_dist.load_prompt(prompt).predict(TEXTS, model, precision="fp32", batch_size=1)
    for one, other in zip(alone, predictions, strict=True):
        assert one.scores == pytest.approx(other.scores, abs=1e-5)
    assert post_dist.load_prompt(prompt).predict([], model) == []


@pytest.mark.parametrize("source", ["t.txt", "-"])
def test_a_byte_order_mark_is_no_text(
    tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = "\ufeffa film\na \ufeff mark inside\n".encode()
    (tmp_path / "t.txt").write_bytes(content)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    path = source if source == "-" else str(tmp_path / source)
    assert read_texts(path, None) == ["a film", "a \ufeff mark inside"]
    content = "a film\nanother".encode("utf-16-le")
    (tmp_path / "t.txt").write_bytes(content)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    with pytest.raises(InputError, match="is not UTF-8 text"):
        read_texts(path, None)


def test_biases_and_head_take_part(tmp_path: Path, model: Path) -> None:
    for bias, label in ((50.0, "no"), (-50.0, "yes")):
        task = replace(served.TASK, class_biases=(bias, 0.0))
        folder = served.write_prompt(tmp_path / f"biased {bias}", model, task)
        found = post_dist.load_prompt(folder).predict(TEXTS, model)
        assert {each.label for each in found} == {label}
        head = LinearHead.untrained(torch.randn(9, 32), 2)
        head = head.with_values(head.weight, torch.tensor([bias, 0.0]))
        folder = served.write_prompt(tmp_path / f"headed {bias}", model, adapter=head)
        found = post_dist.load_prompt(folder).predict(TEXTS, model)
        assert {each.label for each in found} == {label}


def test_an_old_task_answers_with_its_label_words(tmp_path: Path, model: Path) -> None:
    folder = served.write_prompt(tmp_path / "old", model, replace(served.TASK, label_names=()))
    (found,) = post_dist.load_prompt(folder).predict(["a film"], model)
    assert list(found.scores) == ["bad", "good"]


def test_a_model_stays_the_same_when_it_is_downloaded_again(tmp_path: Path) -> None:
    model = served.write_model(tmp_path / "model", "llama")
    metadata = model / ".cache" / "huggingface" / "config.json.metadata"
    metadata.parent.mkdir(parents=True)
    metadata.write_text("1764471600.5")
    prompt = served.write_prompt(tmp_path / "prompt", model)
    # Version 0.1.0 counted hidden files.
    old = {"model": digest_of(file_digests(model))}
    older = served.write_prompt(tmp_path / "older", model, parents=old)
    for each in (prompt, older):
        assert post_dist.load_prompt(each).predict(["a film"], model)
    metadata.write_text("1764475200.5")
    assert post_dist.load_prompt(prompt).predict(["a film"], model)
    with pytest.raises(ArtifactRefused, match="was tuned on another model"):
        post_dist.load_prompt(older).predict(["a film"], model)


@pytest.mark.parametrize(
    ("texts", "options", "code", "message"),
    [
        ("t.csv", (), 2, "has no column 'text' among 2 columns\n  name a column of the file's"),
        ("none.csv", (), 2, "No such file"),
        ("none.txt", (), 2, "No such file"),
        ("t.doc", (), 2, "has no known file type"),
        ("-", ("--column=body",), 2, "have no columns"),
        ("t.jsonl", ("--column=body",), 2, "row 2 has no value in column 'body'"),
        ("t.csv", ("--column=body", "--model=org/name"), 2, "or a hub name with its commit"),
        ("t.csv", ("--column=body", "--model=./none"), 2, "is not a folder"),
        ("t.csv", ("--column=body", "--precision=fp16"), 2, "fp16 does not run on a CPU"),
        ("t.csv", ("--column=body", "--model={other}"), 4, "was tuned on another model"),
        ("t.csv", ("--column=body", f"--key={KEY}"), 4, "it is not signed, and trusted keys are"),
    ],
)
def test_wrong_input_is_refused_and_no_text_is_quoted(  # noqa: PLR0913
    tmp_path: Path,
    model: Path,
    prompt: Path,
    main: Callable,
    texts: str,
    options: tuple[str, ...],
    code: int,
    message: str,
) -> None:
    (tmp_path / "t.csv").write_text("body,label\nsecret,0\n")
    (tmp_path / "t.jsonl").write_text('{"body": "secret"}\n{"body": null}\n')
    (tmp_path / "t.doc").write_text("secret")
    other = tmp_path / "other"
    if any("{other}" in option for option in options):
        tiny.write_model(other, "llama", seed=1)
    given = [option.format(other=other) for option in options]
    source = texts if texts == "-" else tmp_path / texts
    found, out, err = main("predict", prompt, source, f"--model={model}", *given)
    assert (found, out) == (code, "")
    assert message in err
    assert "secret" not in err


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("a text", r"texts is not a list \(found str\)"),
        (None, r"texts is not a list \(found NoneType\)"),
        (map(str, [1, 2]), r"texts is not a list \(found map\)"),
        (np.array(["a"]), r"texts is not a list \(found ndarray\)"),
        ({"a text"}, r"texts is not a list \(found set\)"),
        ([3], r"texts\[0\] is not a string \(found int\)"),
        (["one", b"two"], r"texts\[1\] is not a string \(found bytes\)"),
        (["\ud800"], r"texts\[0\] holds half a character"),
    ],
)
def test_texts_are_a_list_of_strings(prompt: Path, model: Path, texts: Any, message: str) -> None:
    loaded = post_dist.load_prompt(prompt)
    with pytest.raises(InputError, match=message):
        loaded.predict(texts, "no model is needed to tell")
    with pytest.raises(InputError, match=message):
        loaded.on_model(model, precision="fp32").predict(texts)


def test_a_generator_that_is_refused_is_not_used_up(prompt: Path) -> None:
    texts = map(str, [1, 2])
    with pytest.raises(InputError, match="not a list"):
        post_dist.load_prompt(prompt).predict(texts, "no model is needed to tell")
    assert list(texts) == ["1", "2"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda prompt: prompt.predict(["a"], "m", batch_size=0), "batch_size is not greater"),
        (lambda prompt: prompt.predict(["a"], "m", batch_size="3"), "batch_size is not a whole"),
        (lambda prompt: prompt.predict(["a"], "m", batch_size=True), "batch_size is not a whole"),
        (lambda prompt: prompt.predict(["a"], None), "model is not a string or a path"),
        (lambda prompt: prompt.on_model("m", precision="fp8"), "precision is not 'auto', 'fp32'"),
        (lambda prompt: prompt.on_model("x" * 300), "xxx"),
        (lambda prompt: prompt.on_model("\0"), "is not a folder"),
        (lambda prompt: prompt.export("zip", "m", "o"), "form is not 'vllm', 'peft' or 'hub'"),
        (lambda prompt: prompt.export("peft", "m", "\0"), "no file has such a name"),
        (lambda prompt: prompt.export("peft", "m", "x" * 300), "File name too long"),
    ],
)
def test_an_argument_of_another_kind_is_refused(prompt: Path, call: Callable, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call(post_dist.load_prompt(prompt))


def test_modes_around_a_call_change_no_prediction(prompt: Path, model: Path) -> None:
    predictor = post_dist.load_prompt(prompt).on_model(model, precision="fp32")
    expected = predictor.predict(["a film", "another one"])
    with torch.autocast("cpu", torch.bfloat16):
        assert predictor.predict(["a film", "another one"]) == expected


def test_a_batch_is_no_larger_than_its_texts(
    prompt: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor = post_dist.load_prompt(prompt).on_model(model, precision="fp32")
    sizes = []
    collate = Template.collate

    def record(template: Template, chosen: list) -> Batch:
        sizes.append(len(chosen))
        return collate(template, chosen)

    monkeypatch.setattr(Template, "collate", record)
    predictor.predict(["one text"])
    predictor.predict(["one", "two", "three"], batch_size=10**12)
    predictor.predict(["one", "two", "three"], batch_size=2)
    assert sizes == [1, 3, 2, 2]


def test_a_prompt_is_described_in_a_line(prompt: Path) -> None:
    described = repr(post_dist.load_prompt(prompt))
    assert "tensor" not in described
    assert "template=" in described
    assert "epsilon=" in described
    assert len(described) < 200


def test_a_full_disk_behind_standard_output_is_told(
    prompt: Path, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "t.txt").write_text("a film\n")
    command = [sys.executable, "-m", "post_dist", "predict", prompt, tmp_path / "t.txt"]
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(
            [*command, f"--model={model}"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert ended.returncode == 3
    assert "the disk is full" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_file_gets_the_same_values_in_any_locale(
    prompt: Path, model: Path, tmp_path: Path
) -> None:
    folder = served.write_prompt(
        tmp_path / "emoji", model, replace(served.TASK, label_names=("é\U0001f44e", "雪"))
    )
    (tmp_path / "t.txt").write_text("a film\n")
    command = [sys.executable, "-m", "post_dist", "predict", folder, tmp_path / "t.txt"]
    command.append(f"--model={model}")
    printed = []
    for encoding, more in (("ascii", "--format=jsonl"), ("latin-1", "--format=csv")):
        environment = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
        ended = subprocess.run([*command, more], env=environment, capture_output=True, check=True)
        printed.append(ended.stdout.decode())
    assert list(json.loads(printed[0])["scores"]) == ["é\U0001f44e", "雪"]
    header, _ = csv.reader(printed[1].splitlines())
    assert header == ["label", "index", "score é\U0001f44e", "score 雪"]


def test_a_reader_that_ends_early_is_no_error(prompt: Path, model: Path, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("a film\n")
    # Without a buffer, printing itself fails, and typer ends the command.
    command = f"unset PYTHONUNBUFFERED; '{sys.executable}' -m post_dist predict '{prompt}'"
    ended = subprocess.run(
        f"{command} '{tmp_path}/t.txt' --model '{model}' | true",
        shell=True,
        capture_output=True,
        text=True,
    )
    assert "Traceback" not in ended.stderr
    assert "error" not in ended.stderr


def test_a_prompt_of_another_tokenizer_or_width_is_refused(tmp_path: Path, model: Path) -> None:
    # The manifest is the sender's, so a true lineage does not replace the other checks.
    other = tiny.write_model(tmp_path / "wide", "llama", width=48)
    folder = served.write_prompt(tmp_path / "prompt", other)
    with pytest.raises(post_dist.errors.ArtifactRefused, match="width 32, the model of width 48"):
        post_dist.load_prompt(folder).predict(["a"], other)


def test_a_prompt_far_above_the_embeddings_is_refused(tmp_path: Path, model: Path) -> None:
    folder = served.write_prompt(tmp_path / "loud", model, scale=1500.0)
    with pytest.raises(post_dist.errors.ArtifactRefused, match="has a vector of norm"):
        post_dist.load_prompt(folder).predict(["a"], model)


def test_labels_that_cannot_be_handed_on_are_found_in_the_run_file(tmp_path: Path) -> None:
    run = tiny.write_run(tmp_path)
    for label in ("x" * 101, "two\nlines"):
        text = run.read_text().replace("{0: [bad]", f"{{{json.dumps(label)}: [bad]")
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(InputError, match="at most 100 printable characters"):
            post_dist.load_run(tmp_path / "bad.yaml")


def test_label_names_of_any_script_are_handed_on(tmp_path: Path, model: Path) -> None:
    # Persian and Hindi join letters by characters without a width, as composed emoji do.
    joined = (
        "\u0645\u06cc\u200c\u062e\u0648\u0627",
        "\u0915\u094d\u200d\u0937",
        "\U0001f469\u200d\U0001f680",
    )
    assert [label_fault(label) for label in joined] == [None] * 3
    task = replace(served.TASK, label_names=joined[:2])
    folder = served.write_prompt(tmp_path / "joined", model, task)
    (found,) = post_dist.load_prompt(folder).predict(["a film"], model)
    assert found.label in joined
    # Elsewhere, they would only make two labels look alike.
    for label in (
        "no\u200dt",
        "\u0645\u200c",
        "\u200c\u0645",
        "\u0645\u200c\u200d\u0645",
        "\u0645\u200c b",
    ):
        assert "does not print" in str(label_fault(label))
