"""Tokenizers that behave on the texts of the door's trial, and misbehave on the owner's."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from border.hostile import edit_json, sign
from tokenizers import decoders

from post_dist.admission.refusal import refusing
from post_dist.artifacts.manifest import FILE_NAME
from post_dist.artifacts.task import PromptTask
from post_dist.data.task_reader import TaskReader
from post_dist.errors import ArtifactRefused, InputError
from post_dist.models.load import load_tokenizer, load_whole, tokenizer_fingerprint
from post_dist.models.prompt_init import prompt_from_text
from post_dist.runtime import limited_child
from post_dist.runtime.limited_child import ChildFailed, in_limited_child
from post_dist.runtime.process import exit_code_of
from post_dist.verify import verify

SECRET = "zzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzz"
MARKER = {"id": 600, "content": "<br>", "special": False, "normalized": False}
MARKER |= {"single_word": False, "lstrip": False, "rstrip": False}


def normalizer(pattern: dict[str, str], content: str, times: int = 1) -> dict[str, Any]:
    step = {"type": "Replace", "pattern": pattern, "content": content}
    return {"type": "Sequence", "normalizers": [step] * times}


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_student(tmp_path_factory.mktemp("border") / "student")


def hostile(honest: Path, folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Write a student with a changed tokenizer, which the manifest names."""
    student = shutil.copytree(honest, folder / "sent")
    path = student / "tokenizer.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    edit_json(FILE_NAME, tokenizer=tokenizer_fingerprint(load_tokenizer(student)))(student)
    sign(student)
    return student


ATTACKS = {
    "a pattern that never ends": normalizer({"Regex": "(z+)+y"}, ""),
    "a letter that grows": normalizer({"String": "z"}, 500 * "z", times=3),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_tokenizer_that_fails_on_a_private_text_is_refused(
    honest: Path, tmp_path: Path, post_dist: Any, attack: str
) -> None:
    sent = hostile(honest, tmp_path, lambda content: content.update(normalizer=ATTACKS[attack]))
    # The trial of the door has no such text.
    assert verify(sent)["ok"]
    run = tiny.write_run(tmp_path)
    with (tmp_path / "private.csv").open("a") as file:
        # Some of these are in the training split.
        for number in range(9):
            file.write(f"{SECRET} {number} is dull,0\n")
    done = post_dist("tune", run, f"--set=inputs.student={sent}")
    assert done.returncode == 4, done.stderr
    assert "the model's tokenizer cannot read the texts" in done.stderr
    # A library's crash report may quote the text that it was given.
    assert not any(word in done.stdout + done.stderr for word in ("zzzz", "panic", "Traceback"))


def test_check_and_init_limit_the_tokenizer_too(honest: Path, tmp_path: Path, main: Any) -> None:
    endless = ATTACKS["a pattern that never ends"]
    sent = hostile(honest, tmp_path, lambda content: content.update(normalizer=endless))
    run = tiny.write_run(tmp_path)
    run.write_text(run.read_text().replace("[good]", f"[{SECRET}]"))
    code, out, _ = main("check", run, f"--set=inputs.student={sent}")
    assert code == 2
    assert "the model's tokenizer cannot read the texts" in out
    rows = [f"{text},{SECRET if label else 'bad'}\n" for text, label in tiny.sentences(240, 1)]
    (tmp_path / "own.csv").write_text("text,label\n" + "".join(rows))
    options = (f"--data={tmp_path}/own.csv", "--text=text", "--label=label", f"--model={sent}")
    code, _, err = main("init", tmp_path / "work", *options)
    assert code == 4
    assert "the model's tokenizer cannot read the texts" in err


def test_init_reads_a_student_through_the_door(honest: Path, tmp_path: Path, main: Any) -> None:
    grows = ATTACKS["a letter that grows"]
    sent = hostile(honest, tmp_path, lambda content: content.update(normalizer=grows))
    edit_json("config.json", num_hidden_layers=10**6)(sent)
    sign(sent)
    tiny.write_csv(tmp_path / "own.csv", tiny.sentences(240, 1))
    options = (f"--data={tmp_path}/own.csv", "--text=text", "--label=label", f"--model={sent}")
    code, _, err = main("init", tmp_path / "work", *options)
    assert code == 4
    assert "num_hidden_layers has a value that no student needs" in err


def test_a_token_cannot_write_a_line_of_a_message(honest: Path, tmp_path: Path, main: Any) -> None:
    line = "\x1b[31mX\nok: True\n"

    def rename(content: dict[str, Any]) -> None:
        number = content["model"]["vocab"].pop("Ġbrilliant")
        merges = content["model"]["merges"]
        content["model"]["merges"] = [each for each in merges if "".join(each) != "Ġbrilliant"]
        content["added_tokens"].append(MARKER | {"id": number, "content": line, "normalized": True})
        content["normalizer"] = normalizer({"String": "good"}, line)

    sent = hostile(honest, tmp_path, rename)
    run = tiny.write_run(tmp_path)
    code, _, err = main("tune", run, f"--set=inputs.student={sent}")
    assert code == 2
    assert "the label word 'good' is 2 tokens (Ġ \\x1b[31mX\\nok: True\\n)" in err
    _, out, _ = main("check", run, f"--set=inputs.student={sent}")
    assert "\x1b" not in out
    assert "ok: True" not in out.splitlines()


def test_a_private_text_of_which_a_tokenizer_makes_no_token_is_read(
    honest: Path, tmp_path: Path, main: Any
) -> None:
    drops = normalizer({"Regex": "^Review.*$"}, "")
    sent = hostile(honest, tmp_path, lambda content: content.update(normalizer=drops))
    run = tiny.write_run(tmp_path)
    code, _, err = main("tune", run, f"--set=inputs.student={sent}", "--set=tune.steps=2")
    assert code == 0, err


@pytest.mark.parametrize("part", ["template", "label word", "start text", "generated text"])
def test_a_tokenizer_that_fails_on_another_text_of_the_task_is_refused(
    honest: Path, tmp_path: Path, part: str
) -> None:
    grows = ATTACKS["a letter that grows"]
    sent = hostile(honest, tmp_path, lambda content: content.update(normalizer=grows))
    # A decoder may do what a normalizer does.
    tokenizer = load_tokenizer(sent)
    tokenizer.backend_tokenizer.decoder = decoders.Sequence([decoders.Replace("o", 500 * "o")] * 4)
    template = f"{SECRET} {{text}}" if part == "template" else "{text} It was"
    words = SECRET if part == "label word" else "good"
    task = PromptTask(template, (("bad",), (words,)), 48, allow_multi_token=True, init_text="")

    def read() -> None:
        reader = TaskReader(task, tokenizer, masked=False, vocabulary=len(tokenizer))
        if part == "start text":
            prompt_from_text(load_whole(sent, "fp32", torch.device("cpu")), tokenizer, SECRET, 5)
        if part == "generated text":
            reader.texts_of(torch.tensor([tokenizer("good").input_ids]))

    with pytest.raises(ArtifactRefused, match="the model's tokenizer cannot read the texts"):
        read()


def test_a_start_text_without_a_token_of_the_model_is_refused(honest: Path, tmp_path: Path) -> None:
    sent = hostile(honest, tmp_path, lambda content: content["added_tokens"].append(MARKER))
    model = load_whole(sent, "fp32", torch.device("cpu"))
    with pytest.raises(InputError, match="the start text '<br>' has no token of the model"):
        prompt_from_text(model, load_tokenizer(sent), "<br>", 5)


def test_a_private_text_with_a_token_without_an_embedding_is_read(
    honest: Path, tmp_path: Path, main: Any
) -> None:
    sent = hostile(honest, tmp_path, lambda content: content["added_tokens"].append(MARKER))
    assert verify(sent)["ok"]
    run = tiny.write_run(tmp_path)
    rows = [(f"{text}<br>more", label) for text, label in tiny.sentences(200, 1)]
    tiny.write_csv(tmp_path / "private.csv", rows)
    code, _, err = main("tune", run, f"--set=inputs.student={sent}", "--set=tune.steps=2")
    assert code == 0, err


def test_a_panic_of_a_library_ends_like_any_other_error(
    honest: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    endless = ATTACKS["a pattern that never ends"]
    sent = hostile(honest, tmp_path, lambda content: content.update(normalizer=endless))
    tokenizer = load_tokenizer(sent)
    assert exit_code_of(lambda: tokenizer(SECRET)) == 1
    assert "internal error: PanicException" in capsys.readouterr().err
    with pytest.raises(ArtifactRefused, match="PanicException"), refusing(sent):
        tokenizer(SECRET)


def test_a_child_is_ended_at_its_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    def endless() -> None:
        while True:
            pass

    assert in_limited_child(lambda: [1, "é"], 5, 1 << 26) == [1, "é"]
    with pytest.raises(ChildFailed):
        in_limited_child(endless, 1, 1 << 26)
    with pytest.raises(ChildFailed):
        in_limited_child(lambda: len(bytes(1 << 30)), 5, 1 << 26)
    with pytest.raises(ChildFailed):
        in_limited_child(lambda: 1 // 0, 5, 1 << 26)
    # What only waits uses no processor.
    monkeypatch.setattr(limited_child, "_WAIT_FACTOR", 1)
    with pytest.raises(ChildFailed):
        in_limited_child(lambda: time.sleep(30), 1, 1 << 26)
