"""Wrong inputs: one clear error each, its exit code, no traceback, and nothing half-written."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from safetensors.torch import load_file, save_file
from started import Command

from post_dist.artifacts.head import LinearHead
from post_dist.artifacts.manifest import FILE_NAME, read_manifest
from post_dist.artifacts.prompt import PromptContents, Provenance, read_prompt, write_prompt
from post_dist.files import file_digest
from post_dist.models.load import load_tokenizer, tokenizer_fingerprint
from post_dist.runtime.launcher import find_launcher

Fields = dict[str, Any]


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory, post_dist: Callable) -> Path:
    """A folder with a run file and its data, and a finished `student/` and `prompt/`."""
    folder = tmp_path_factory.mktemp("base")
    run = tiny.write_run(folder)
    assert post_dist("pipeline", run, "--set", "evaluate.baselines=[]").returncode == 0
    for stage, name in (("distill", "student"), ("tune", "prompt")):
        shutil.copytree(next(folder.glob(f"runs/tiny/{stage}-*/artifact")), folder / name)
    shutil.rmtree(folder / "runs")
    return folder


@dataclass(frozen=True)
class Case:
    """A wrong input.

    Attributes:
        name: name of the test.
        code: exit code that the command must have.
        message: pattern that its error must match.
        change: what is done to the fields of a good run file and to its folder.
        command: the command line.
        keep_yaml: whether `change` has written the run file itself.
    """

    name: str
    code: int
    message: str
    change: Callable[[Fields, Path], object] = lambda fields, folder: None
    command: tuple[str, ...] = ("pipeline", "{run}")
    keep_yaml: bool = field(default=False)


def put(place: str, value: object) -> Callable[[Fields, Path], object]:
    """Set a field of the run file."""

    def change(fields: Fields, folder: Path) -> None:
        *sections, key = place.split(".")
        for section in sections:
            fields = fields.setdefault(section, {})
        fields[key] = value

    return change


def private(**changes: object) -> Callable[[Fields, Path], object]:
    """A privacy section, changed; None drops a field."""
    section = {"enabled": True, "target_epsilon": 8.0, "declared_examples": 160} | changes
    return put("privacy", {name: value for name, value in section.items() if value is not None})


def write(name: str, content: str | bytes) -> Callable[[Fields, Path], object]:
    """Replace a file in the folder."""
    data = content if isinstance(content, bytes) else content.encode()
    return lambda fields, folder: (folder / name).write_bytes(data)


def drop(name: str) -> Callable[[Fields, Path], object]:
    """Remove a file from the folder."""
    return lambda fields, folder: (folder / name).unlink()


def drop_section(name: str) -> Callable[[Fields, Path], object]:
    """Remove a section of the run file."""
    return lambda fields, folder: fields.pop(name)


def both(*changes: Callable[[Fields, Path], object]) -> Callable[[Fields, Path], object]:
    """Make several changes, one after another."""

    def change_all(fields: Fields, folder: Path) -> None:
        for change in changes:
            change(fields, folder)

    return change_all


def other_teacher(family: str, **sizes: int) -> Callable[[Fields, Path], object]:
    """Put another model in the teacher's place."""

    def change(fields: Fields, folder: Path) -> None:
        shutil.rmtree(folder / "teacher")
        tiny.write_model(folder / "teacher", family, **sizes)

    return change


def other_tokenizer(model: str) -> Callable[[Fields, Path], object]:
    """Give the model in a folder a tokenizer with one token more."""

    def change(fields: Fields, folder: Path) -> None:
        words = tiny.tokenizer("llama")
        words.add_tokens(["<new>"])  # a marker needs no embedding
        words.save_pretrained(folder / model)
        if model == "student":
            tokenizer = tokenizer_fingerprint(load_tokenizer(folder / model))
            resign(folder / model, tokenizer=tokenizer)
            adopt(folder)

    return change


def resign(folder: Path, **fields: object) -> None:
    """Write the hashes of changed files into an artifact's manifest, and other fields."""
    manifest = json.loads((folder / FILE_NAME).read_text()) | fields
    manifest["files"] = {name: file_digest(folder / name) for name in manifest["files"]}
    (folder / FILE_NAME).write_text(json.dumps(manifest))


def adopt(folder: Path) -> None:
    """Let the prompt say that it was tuned on the student as it is now."""
    student = read_manifest(folder / "student", "student")
    resign(folder / "prompt", parents={"model": student.digest})


def prompt_tensor(tensor: torch.Tensor) -> Callable[[Fields, Path], object]:
    """Replace the values of the prompt."""

    def change(fields: Fields, folder: Path) -> None:
        save_file({"prompt_embeddings": tensor}, folder / "prompt/adapter_model.safetensors")
        config = json.loads((folder / "prompt/adapter_config.json").read_text())
        config |= {"num_virtual_tokens": len(tensor), "token_dim": tensor.shape[1]}
        (folder / "prompt/adapter_config.json").write_text(json.dumps(config))
        resign(folder / "prompt")

    return change


def head(fields: Fields, folder: Path) -> None:
    """Put an untrained head behind the prompt."""
    prompt = read_prompt(folder / "prompt")
    untrained = LinearHead.untrained(torch.randn(9, 32), 2)
    contents = PromptContents(prompt.embeddings, prompt.task, None, untrained)
    found = prompt.manifest
    config = found.config | {"tune": found.config["tune"] | {"adapter": "head"}}
    origin = Provenance("model", found.tokenizer, found.parents, config)
    shutil.rmtree(folder / "prompt")
    write_prompt(folder / "prompt", contents, origin, lambda _: None)


def class_biases(fields: Fields, folder: Path) -> None:
    """Give the prompt class biases, and leave its owner with the student alone."""
    task = json.loads((folder / "prompt/task.json").read_text())
    (folder / "prompt/task.json").write_text(json.dumps(task | {"class_biases": [0.5, -0.5]}))
    resign(folder / "prompt")
    fields["evaluate"]["baselines"] = []
    del fields["teacher"]


def fifo(fields: Fields, folder: Path) -> None:
    """Make a FIFO, which a reader would wait for."""
    os.mkfifo(folder / "fifo")


def short_student(fields: Fields, folder: Path) -> None:
    """Give the student a context of 50 tokens."""
    config = json.loads((folder / "student/config.json").read_text())
    (folder / "student/config.json").write_text(
        json.dumps(config | {"max_position_embeddings": 50})
    )
    resign(folder / "student")
    adopt(folder)


def missing_layer(fields: Fields, folder: Path) -> None:
    """Remove the weights of the teacher's last layer."""
    file = folder / "teacher/model.safetensors"
    tensors = load_file(file)
    kept = {name: tensor for name, tensor in tensors.items() if "layers.3" not in name}
    save_file(kept, file, {"format": "pt"})


GIVEN_STUDENT = ("--set", "inputs.student={student}")
GIVEN_PROMPT = ("--set", "inputs.source_prompt={prompt}")
DISTILL = ("distill", "{run}")
TUNE = ("tune", "{run}", *GIVEN_STUDENT)
TRANSFER = ("transfer", "{run}", *GIVEN_STUDENT, *GIVEN_PROMPT)
EVALUATE = ("evaluate", "{run}")
PRIVATE_DATA = put("private_task.path", "x" * 300 + ".csv")
OWNER_EVALUATES = (*EVALUATE, *GIVEN_STUDENT, *GIVEN_PROMPT)

CASES = [
    # the run file and the command line
    Case(
        "run file missing",
        2,
        "cannot read the run file",
        command=("pipeline", "{folder}/none.yaml"),
    ),
    Case("run file is a folder", 2, "cannot read the run file", command=("pipeline", "{folder}")),
    Case("run file is endless", 2, "it is not a file", command=("pipeline", "/dev/zero")),
    Case("run file is a FIFO", 2, "it is not a file", fifo, ("tune", "{folder}/fifo")),
    Case("run file is huge", 2, "it is above", write("run.yaml", "#" * (1 << 21)), keep_yaml=True),
    Case(
        "a line break in an option of sbatch",
        2,
        r"cluster.account: must be one line of printable characters",
        put("cluster", {"account": "a\ntouch owned"}),
    ),
    Case("run file empty", 2, "holds no sections", write("run.yaml", ""), keep_yaml=True),
    Case(
        "run file not YAML",
        2,
        "not valid YAML",
        write("run.yaml", "name: [unclosed"),
        keep_yaml=True,
    ),
    Case(
        "run file binary",
        2,
        "cannot read the run file",
        write("run.yaml", b"\xff\xfe\x00\x81"),
        keep_yaml=True,
    ),
    Case(
        "key twice",
        2,
        "the key 'name' appears twice",
        write("run.yaml", "name: a\nname: b\n"),
        keep_yaml=True,
    ),
    Case(
        "unknown section", 2, r"transfr: unknown key; did you mean 'transfer'\?", put("transfr", {})
    ),
    Case(
        "unknown key",
        2,
        r"transfer.alhpa: unknown key; did you mean 'alpha'\?",
        put("transfer.alhpa", 0.1),
    ),
    Case(
        "wrong type",
        2,
        r"distill.steps: input should be a valid integer.*found 'many'",
        put("distill.steps", "many"),
    ),
    Case(
        "out of range",
        2,
        "transfer.alpha: input should be less than or equal to 1",
        put("transfer.alpha", 1.5),
    ),
    Case(
        "not a choice",
        2,
        "engine.zero_stage: input should be 0, 1, 2 or 3",
        put("engine.zero_stage", 4),
    ),
    Case(
        "not a number",
        2,
        "tune.learning_rate: input should be a finite number",
        put("tune.learning_rate", float("nan")),
    ),
    Case("bad name", 2, "name: string should match pattern", put("name", "../escape")),
    Case("name missing", 2, "name is missing", drop_section("name")),
    Case(
        "override without value",
        2,
        "not of the form",
        command=("pipeline", "{run}", "--set", "transfer.alpha"),
    ),
    Case(
        "override through a value",
        2,
        "'name' is not a section",
        command=("pipeline", "{run}", "--set", "name.x=1"),
    ),
    Case(
        "override unknown", 2, "unknown key", command=("pipeline", "{run}", "--set", "transfer.x=1")
    ),
    Case("unknown command", 2, "No such command", command=("distil", "{run}")),
    Case("unknown option", 2, "No such option", command=("pipeline", "{run}", "--fast")),
    Case("bad resume", 2, "Invalid value", command=("pipeline", "{run}", "--resume", "sometimes")),
    Case("no private task", 2, "lacks the section private_task", drop_section("private_task")),
    Case("no teacher", 2, "lacks the section", drop_section("teacher"), DISTILL),
    Case("no corpus", 2, "lacks the section", drop_section("corpus")),
    Case(
        "init over a run file",
        2,
        "exists already",
        write("demo.yaml", "mine"),
        ("init", "{folder}"),
    ),
    Case("init into a file", 2, "cannot write", command=("init", "{run}")),
    # models
    Case("teacher missing", 2, "is not a folder", put("teacher.path", "./nowhere")),
    Case("hub without commit", 2, "needs `revision`", put("teacher.path", "org/model")),
    Case("teacher without weights", 2, "no safetensors weights", drop("teacher/model.safetensors")),
    Case(
        "teacher weights cut short",
        2,
        "cannot be loaded",
        write("teacher/model.safetensors", b"\x10\0\0\0\0\0\0\0{}"),
        DISTILL,
    ),
    Case("teacher lacks a layer", 2, "lacks weights", missing_layer, DISTILL),
    Case("teacher config broken", 2, "no usable config.json", write("teacher/config.json", "{")),
    Case(
        "teacher without tokenizer",
        2,
        "no usable tokenizer",
        both(drop("teacher/tokenizer.json"), drop("teacher/tokenizer_config.json")),
    ),
    Case(
        "too many layers", 2, "the teacher has layers 0 to 3", put("student.num_layers", 9), DISTILL
    ),
    Case(
        "layer out of range",
        2,
        "the teacher has layers 0 to 3",
        put("student", {"layers": [0, 7]}),
        DISTILL,
    ),
    Case("layers unordered", 2, "rising numbers", put("student", {"layers": [3, 0]}), DISTILL),
    Case(
        "frozen block not the teacher's",
        2,
        "own first layers",
        put("student", {"layers": [1, 2], "frozen_lower_layers": 1}),
        DISTILL,
    ),
    Case("nothing to train", 2, "leaves none of 2 layers", put("student.frozen_lower_layers", 2)),
    Case(
        "frozen block on trained embeddings",
        2,
        "needs freeze_embeddings",
        both(put("student.frozen_lower_layers", 1), put("student.freeze_embeddings", False)),
    ),
    Case(
        "trained head in shards",
        2,
        "trained head",
        both(put("student.freeze_head", False), put("engine.zero_stage", 3)),
        DISTILL,
    ),
    Case(
        "settings of DeepSpeed that it refuses at its start",
        2,
        "engine.deepspeed: DeepSpeed does not start with these settings: allgather_bucket_size",
        put("engine.deepspeed", {"zero_optimization": {"allgather_bucket_size": 1}}),
        DISTILL,
    ),
    Case(
        "fp16 on a CPU", 2, "fp16 does not run on a CPU", put("engine.precision", "fp16"), DISTILL
    ),
    # data
    Case(
        "data missing", 2, "private_task.path: .*No such file", put("private_task.path", "none.csv")
    ),
    Case("data is a folder", 2, "teacher is a folder", put("private_task.path", "teacher")),
    Case("data empty", 2, "is empty", write("private.csv", "")),
    Case("data without rows", 2, "has no rows", write("private.csv", "text,label\n")),
    Case(
        "data of an unknown kind",
        2,
        "no known file type",
        both(write("private.xlsx", "x"), put("private_task.path", "private.xlsx")),
    ),
    Case(
        "data not UTF-8", 2, "is not UTF-8 text", write("private.csv", b"text,label\n\xff\xfe,1\n")
    ),
    Case(
        "data with a first row too long",
        2,
        "private.csv, line 2: more fields than the header has",
        write("private.csv", "text,label\nsecret,1,\nsecret,0\n"),
    ),
    Case(
        "data with a row too short",
        2,
        "private.csv, line 3: fewer fields than the header has",
        write("private.csv", "text,label\nsecret,1\nsecret\n"),
    ),
    Case(
        "data not of objects",
        2,
        "cannot be read as JSONL",
        both(write("private.jsonl", "[1]\n"), put("private_task.path", "private.jsonl")),
    ),
    Case(
        "data not JSON",
        2,
        "cannot be read as JSONL",
        both(write("private.jsonl", "{oops"), put("private_task.path", "private.jsonl")),
    ),
    Case(
        "column missing", 2, "no column 'sentiment'", put("private_task.label_column", "sentiment")
    ),
    Case("text column missing", 2, "no column 'body'", put("private_task.text", "{body}")),
    Case(
        "label outside the verbalizer",
        2,
        "row 1 has a label .* not in private_task.labels",
        write("private.csv", "text,label\nsecret,9\n"),
    ),
    Case("split empty", 2, "the test split is empty", put("private_task.test_share", 0)),
    Case("shares too large", 2, "leave nothing to train on", put("private_task.test_share", 0.95)),
    Case("one class", 2, "two classes or more", put("private_task.labels", {"0": ["bad"]})),
    Case("two sources", 2, "give either", put("private_task.hub", "org/data")),
    Case(
        "label word of several tokens",
        2,
        "the label word 'extraordinary' is",
        put("private_task.labels", {"0": ["bad"], "1": ["extraordinary"]}),
    ),
    Case(
        "label word twice",
        2,
        "share the token",
        put("private_task.labels", {"0": ["bad"], "1": ["bad"]}),
    ),
    Case(
        "template without text",
        2,
        r"must hold \{text\} once",
        put("private_task.template", "It was"),
    ),
    Case(
        "template with open brace",
        2,
        "braces that do not pair up",
        put("private_task.template", "{text It was"),
    ),
    Case(
        "template for a masked model",
        2,
        r"\{mask\} is for masked models",
        put("private_task.template", "{text} It was {mask}"),
    ),
    Case(
        "template ends in a space",
        2,
        "ends in white space",
        put("private_task.template", "{text} It was "),
    ),
    Case(
        "template too long",
        2,
        "alone fills max_length",
        put("private_task.template", "{text}" + " It was good" * 20),
    ),
    Case(
        "corpus of two columns of one name",
        2,
        "columns.csv: two columns have the same name",
        both(write("columns.csv", "text,text\na,b\n"), put("corpus.path", "columns.csv")),
        DISTILL,
    ),
    Case(
        "corpus is a ledger",
        2,
        "has the name of a record of post_dist",
        both(
            write("private.csv.ledger.jsonl", "{}"), put("corpus.path", "private.csv.ledger.jsonl")
        ),
        DISTILL,
    ),
    Case(
        "corpus without a column",
        2,
        "body.csv: there is no column 'text'",
        both(write("body.csv", "body\na\n"), put("corpus.path", "body.csv")),
        DISTILL,
    ),
    Case("corpus too short", 2, "to be held out", put("corpus.held_out_sequences", 5000), DISTILL),
    Case(
        "documents that see each other",
        2,
        "set corpus.separate_documents: false",
        other_teacher("opt"),
        DISTILL,
    ),
    Case(
        "corpus longer than the context",
        2,
        "exceeds the teacher's context",
        put("corpus.sequence_length", 200),
        DISTILL,
    ),
    Case(
        "prompt longer than the context",
        2,
        "do not fit into the context of the model",
        put("tune.num_virtual_tokens", 100),
        TUNE,
    ),
    # artifacts and privacy
    Case(
        "public task is private",
        5,
        "public_task is private",
        put("public_task.visibility", "private"),
        TRANSFER,
    ),
    Case(
        "private task is public",
        2,
        "visibility must be private",
        put("private_task.visibility", "public"),
    ),
    Case(
        "student missing",
        2,
        "is not a folder",
        command=("tune", "{run}", "--set", "inputs.student=./none"),
    ),
    Case(
        "student is a prompt",
        4,
        "is a soft prompt, not a student",
        command=("tune", "{run}", "--set", "inputs.student={prompt}"),
    ),
    Case(
        "student changed",
        4,
        "is not the file that was written",
        write("student/config.json", "{}"),
        TUNE,
    ),
    Case(
        "start of another width",
        2,
        "of width 32 do not fit a target of width 48",
        other_teacher("llama", width=48),
        (*TRANSFER, "--set", "transfer.trained_share=1"),
    ),
    Case(
        "tokenizer mismatch",
        4,
        "is not the one that the prompt was tuned with",
        other_tokenizer("student"),
        TRANSFER,
    ),
    Case(
        "vocabularies token by token",
        2,
        "student and target have different tokenizers",
        other_tokenizer("teacher"),
        TRANSFER,
    ),
    Case(
        "prompt with NaN",
        4,
        "not finite",
        prompt_tensor(torch.full((5, 32), float("nan"))),
        TRANSFER,
    ),
    Case(
        "prompt of another width",
        4,
        "the prompt has vectors of width 31",
        prompt_tensor(torch.zeros(5, 31)),
        TRANSFER,
    ),
    Case(
        "biases for other classes",
        4,
        "other label words",
        both(class_biases, put("private_task.labels.2", ["film"])),
        OWNER_EVALUATES,
    ),
    Case(
        "biases in another order",
        4,
        "or another order",
        both(class_biases, put("private_task.labels", {"0": ["good"], "1": ["bad"]})),
        OWNER_EVALUATES,
    ),
    Case(
        "texts longer than the context",
        2,
        r"do not fit into the context of the student \(128\)",
        both(class_biases, put("private_task.max_length", 128)),
        OWNER_EVALUATES,
    ),
    Case(
        "student of a shorter context",
        2,
        r"do not fit into the context of the student \(50\)",
        short_student,
        TRANSFER,
    ),
    Case("stage before its turn", 2, "distill is not finished", command=EVALUATE),
    Case("tune before distill", 2, "run `post-dist distill` first", command=("tune", "{run}")),
    # paths that cannot be looked at
    Case("run file with a long name", 2, "File name too long", command=("plan", "x" * 300)),
    Case("private data with a long name", 2, "File name too long", PRIVATE_DATA, TUNE),
    Case("teacher with a long name", 2, "File name too long", put("teacher.path", "x" * 300)),
    Case(
        "student with a long name",
        2,
        "File name too long",
        command=("tune", "{run}", "--set", f"inputs.student={'x' * 300}"),
    ),
    Case(
        "output with a long name", 2, "File name too long", command=(*TUNE, "--output", "x" * 300)
    ),
    Case("runs with a long name", 2, "File name too long", command=("status", "x" * 300)),
    Case("report with a long name", 2, "File name too long", command=("report", "x" * 300)),
    Case("folder with a long name", 2, "File name too long", command=("init", "x" * 300)),
    Case("ledger with a long name", 2, "File name too long", command=("budget", "x" * 300)),
    Case(
        "anchors with a long name",
        2,
        "File name too long",
        command=("budget", "{run}", "--anchors", "x" * 300),
    ),
    Case(
        "export with a long name",
        2,
        "File name too long",
        command=("export", "{prompt}", "--to=peft", "--model={student}", f"--output={'x' * 300}"),
    ),
    Case(
        "key with a long name",
        2,
        "File name too long",
        command=("sign", "{prompt}", "--key", "x" * 300),
    ),
    # the privacy plan
    Case(
        "privacy without a target",
        2,
        "give either target_epsilon or noise_multiplier",
        put("privacy", {"enabled": True}),
        TUNE,
    ),
    Case(
        "privacy with two targets",
        2,
        "give either target_epsilon or noise_multiplier",
        private(noise_multiplier=1.0),
        TUNE,
    ),
    Case(
        "privacy without delta",
        2,
        "give declared_examples, or both",
        private(declared_examples=None),
        TUNE,
    ),
    Case(
        "privacy of no epsilon",
        2,
        "privacy.target_epsilon: input should be greater than 0",
        private(target_epsilon=0),
        TUNE,
    ),
    Case(
        "privacy of no noise",
        2,
        "noise_multiplier: input should be greater than",
        private(target_epsilon=None, noise_multiplier=0.01),
        TUNE,
    ),
    Case(
        "privacy with a quantile of too few gradients",
        2,
        "set these fields of the section privacy",
        private(target_epsilon=None, noise_multiplier=2, clip_quantile=0.5, expected_batch_size=4),
        ("privacy", "{run}"),
    ),
    Case(
        "more rows a step than declared",
        2,
        "exceeds privacy.declared_examples",
        private(declared_examples=4),
        TUNE,
    ),
    Case(
        "more rows a step than declared, asked for the price",
        2,
        "exceeds privacy.declared_examples",
        private(enabled=False, declared_examples=4),
        ("privacy", "{run}"),
    ),
    Case(
        "delta that protects nobody",
        2,
        "a delta of 0.0135 is above 0.01",
        private(declared_examples=50),
        TUNE,
    ),
    Case(
        "head for classes in another order",
        4,
        "or another order",
        both(head, put("private_task.labels", {"0": ["good"], "1": ["bad"]})),
        (*OWNER_EVALUATES, "--set", "teacher=null", "--set", "evaluate.baselines=[]"),
    ),
    Case(
        "delta of rounding",
        2,
        "target_delta: input should be greater than",
        private(target_delta=1e-16),
        ("privacy", "{run}"),
    ),
    Case(
        "rows cut to a count",
        2,
        "one more example would push another one out",
        both(private(), put("private_task.max_rows", 50)),
        TUNE,
    ),
    Case(
        "search without privacy",
        2,
        "tune.search needs privacy",
        put("tune.search", {"mean_trials": 3, "learning_rate": [0.1]}),
        TUNE,
    ),
    Case(
        "search for nothing",
        2,
        "names nothing to try",
        both(private(), put("tune.search", {"mean_trials": 3})),
        TUNE,
    ),
    Case(
        "private rows without a plan",
        2,
        "give declared_examples, or both",
        put("evaluate.private_rows", [8]),
        TUNE,
    ),
    Case(
        "epsilon out of reach",
        2,
        "no noise multiplier up to 200",
        private(
            target_epsilon=0.01, sampling_probability=1.0, expected_batch_size=160, steps=10_000
        ),
        TUNE,
    ),
    Case(
        "a batch of other examples",
        2,
        "a step draws 0.00016 of 160 examples, and the sum of their gradients is divided by 8",
        private(sampling_probability=1e-6),
        TUNE,
    ),
    Case(
        "epsilon for nothing",
        2,
        "is met with a noise multiplier below",
        private(target_epsilon=500.0),
        TUNE,
    ),
    Case(
        "ledger in no folder",
        2,
        "cannot write the privacy ledger",
        private(ledger="none/ledger.jsonl"),
        TUNE,
    ),
    Case(
        "plan without privacy", 2, "privacy: give declared_examples", command=("privacy", "{run}")
    ),
    Case(
        "budget of nothing",
        2,
        "cannot read the privacy ledger",
        command=("budget", "{folder}/none.jsonl"),
    ),
    Case(
        "budget of no ledger",
        4,
        "row 1 is not a ledger row",
        command=("budget", "{folder}/public.csv"),
    ),
    Case(
        "audit of too much",
        2,
        "too many canaries",
        private(target_epsilon=None, noise_multiplier=0.2, target_delta=1e-6),
        ("audit", "{run}"),
    ),
    Case(
        "bench without a student", 2, "distill is not finished", command=("bench", "tune", "{run}")
    ),
    Case("bench of no stage", 2, "No such command", command=("bench", "evaluate", "{run}")),
    Case(
        "bench scale without public text",
        2,
        "lacks the section public_task",
        lambda fields, folder: fields.pop("public_task"),
        command=("bench", "scale", "{run}"),
    ),
    Case(
        "bench scale on no nodes",
        2,
        "--submit 2,0: not numbers above zero",
        command=("bench", "scale", "{run}", "--submit", "2,0"),
    ),
    Case(
        "bench scale twice on one node",
        2,
        "--submit 1,1: a number is given twice",
        command=("bench", "scale", "{run}", "--submit", "1,1"),
    ),
    Case(
        "bench scale into one file",
        2,
        "--write does not go with --submit",
        command=("bench", "scale", "{run}", "--submit=1", "--write={folder}/figures.json"),
    ),
    # places
    Case(
        "output is a file",
        2,
        "cannot write",
        write("taken", "x"),
        ("distill", "{run}", "--output", "{folder}/taken"),
    ),
    Case(
        "output is a file, of a job",
        2,
        "cannot write",
        write("taken", "x"),
        ("submit", "{run}", "distill", "--local", "--output={folder}/taken"),
    ),
    Case(
        "output of nobody",
        2,
        "output: ~nobody-here/runs: .*home",
        put("output", "~nobody-here/runs"),
        DISTILL,
    ),
    Case(
        "output inside a file",
        2,
        "cannot write",
        write("taken", "x"),
        ("distill", "{run}", "--output", "{folder}/taken/deep"),
    ),
    Case(
        "output cannot be made",
        2,
        "cannot write",
        command=("distill", "{run}", "--output", "/proc/nowhere"),
    ),
    # Here the copy of the student is what is written first.
    Case(
        "output of tune inside a file",
        2,
        "cannot write .*Not a directory\n  choose another place",
        write("taken", "x"),
        (*TUNE, "--output", "{folder}/taken/deep"),
    ),
    Case(
        "output of tune cannot be made",
        2,
        "cannot write .*\n  choose another place",
        command=(*TUNE, "--output", "/proc/nowhere"),
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_wrong_input(case: Case, base: Path, tmp_path: Path, main: Callable) -> None:
    folder = tmp_path / "work"
    shutil.copytree(base, folder)
    fields = yaml.safe_load((folder / "run.yaml").read_text())
    case.change(fields, folder)
    if not case.keep_yaml:
        (folder / "run.yaml").write_text(yaml.safe_dump(fields))
    places = {
        "run": folder / "run.yaml",
        "folder": folder,
        "student": folder / "student",
        "prompt": folder / "prompt",
    }
    code, out, err = main(*(part.format(**places) for part in case.command))
    assert code == case.code, err
    assert re.search(case.message, err, re.DOTALL), err
    assert "Traceback" not in err
    assert "internal error" not in err
    assert "secret" not in err
    assert out == ""
    assert not list(folder.rglob("*.partial"))
    assert not list(folder.glob("runs/*/*/artifact"))
    assert not list(folder.glob("runs/*/tune-*")), "a refused stage leaves no folder"
    if not list(folder.glob("runs/*/*/resolved.yaml")):
        assert not list(folder.glob("runs/*/admitted")), "a refused stage leaves no copy"


TORCHRUN = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            {"RANK": "0", "WORLD_SIZE": "2"},
            "RANK, WORLD_SIZE are set, but LOCAL_RANK, MASTER_ADDR, MASTER_PORT are not",
        ),
        ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "4"}, "Slurm started 4 tasks"),
        (
            TORCHRUN | {"RANK": "0", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "4"},
            "WORLD_SIZE=2 contradicts SLURM_STEP_NUM_TASKS=4",
        ),
        (
            TORCHRUN | {"RANK": "x"},
            "RANK, WORLD_SIZE, LOCAL_RANK and MASTER_PORT must be whole numbers",
        ),
        (
            TORCHRUN | {"RANK": "0", "MASTER_PORT": "tcp"},
            "RANK, WORLD_SIZE, LOCAL_RANK and MASTER_PORT must be whole numbers",
        ),
        (
            TORCHRUN | {"RANK": "3"},
            "RANK=3 is not below WORLD_SIZE=2",
        ),
    ],
)
def test_a_launcher_that_contradicts_itself_is_refused(
    base: Path, variables: dict[str, str], message: str
) -> None:
    command = Command("distill", base / "run.yaml", variables=variables)
    _, err = command.communicate()
    assert command.returncode == 3
    assert message in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("step", "launcher"),
    [
        ({}, "none"),
        (TORCHRUN | {"RANK": "0"}, "deepspeed or plain environment"),
        (TORCHRUN | {"RANK": "0", "SLURM_STEP_NUM_TASKS": "2"}, "srun"),
    ],
)
def test_a_batch_script_is_no_task_of_its_job(step: dict[str, str], launcher: str) -> None:
    # Slurm sets these two in batch scripts and in interactive allocations too.
    assert find_launcher({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"} | step) == launcher


def test_a_machine_without_a_folder_for_temporary_files_is_refused(
    main: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/proc/nowhere"])
    code, out, err = main("ls", "--json")
    assert (code, json.loads(out)["exit_code"]) == (3, 3)
    assert "there is no folder for temporary files" in err
    assert "set TMPDIR to another folder" in err
    assert "Traceback" not in err


def test_a_refused_stage_leaves_no_folder(base: Path, main: Callable, tmp_path: Path) -> None:
    options = ("--set=student.num_layers=9", f"--output={tmp_path / 'runs'}")
    code, _, err = main("distill", base / "run.yaml", *options)
    assert code == 2, err
    assert "asks for 9 layers" in err
    assert not (tmp_path / "runs").exists()
