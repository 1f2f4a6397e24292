"""Checks that runs on neighboring data leave the same traces, but for the declared noise.

Each run has the same key, so it draws the same units. The only difference between two runs is the
example, label or user in which their data differ.
"""

import io
import logging
import os
import re
import secrets
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import tiny
import torch
from privacy.checks import folder, on_a_coarse_grid, part
from safetensors import safe_open
from safetensors.torch import load_file

Rows = list[tuple[str, int, str]]
"""Text, label and user of each row."""

NOISY = re.compile(r"\d+(\.(exp_avg(_sq)?|ax))?|clipping_norm|.*lora_B\.weight")
"""Tensors that hold noise: in a checkpoint the parameters, their moments or mean, and an adapted
norm; of a LoRA the factors that start at zero, which the smallest noise changes."""

OWNERS_OWN = {"lock", ".name_key", "randomness.json"}

# What differs between any two runs of the same data, and what replaces it before a comparison.
BY_CHANCE = (
    (r"tune-[0-9a-f]{8}", "tune-NAME"),
    (r"[0-9a-f]{64}", "HASH"),
    (r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d[.,\d]*([+-]\d\d:\d\d|Z)?", "TIME"),
    (r"\d\d:\d\d:\d\d", "TIME"),
    (r"\b\d+(\.\d+)? ?(s|ms|s/it|it/s|seconds|min)\b", "SECONDS"),
)


@dataclass(frozen=True)
class Traces:
    """What others than the owner may see of a run.

    Attributes:
        said: exit code and everything that was printed.
        files: by relative path, the mode and the contents of each file, without the noise.
        name: name of the run's folder.
    """

    said: tuple[int, str]
    files: dict[str, Any]
    name: str


@on_a_coarse_grid
def neighbors_leave_the_same_traces() -> None:
    """One more example, another label, one more user; finished, and stopped in the middle."""
    rows = data(40)
    more = [*rows, (" and ".join(["the plot 7 is awful"] * 5), 0, "user 3")]
    changed = [(rows[0][0], 1 - rows[0][1], rows[0][2]), *rows[1:]]
    of_a_user = [*more, ("the music 3 is weak the cast 1 is boring 98", 0, "user 99")]
    by_user = ["private_task.user_column=user"]
    # At so small a rate nothing may change a prompt, so the noise is compared as well.
    still = ["tune.learning_rate=1e-30"]
    compare([rows, more, changed], still)
    adapted = ["privacy.clip_quantile=0.5", "privacy.noise_multiplier=0.7"]
    compare([rows, more], adapted, stop=True)
    compare([rows, of_a_user], [*by_user, *still])
    compare([rows, of_a_user], by_user, stop=True)
    head = ["inputs.public_prompt=public", "tune.adapter=head"]
    compare([rows, more, changed], [*head, *still])
    compare([rows, more], head, stop=True)
    # Without a public prompt, the student's own texts say how large its states are.
    # Its weights begin at zero, where a rate must be smaller still to change nothing.
    own = ["tune.adapter=head", "tune.num_virtual_tokens=5", "privacy.learning_rate=1e-60"]
    compare([rows, more], own)
    lora = ["tune.adapter=lora", "tune.lora.r=2", "tune.lora.upper_layers=1"]
    compare([rows, more, changed], [*lora, *still])
    compare([rows, more], lora, stop=True)
    prefix = ["tune.adapter=prefix"]
    compare([rows, more, changed], [*prefix, *still])
    compare([rows, more], prefix, stop=True)


def compare(data_sets: Sequence[Rows], settings: Sequence[str], *, stop: bool = False) -> None:
    """Compare what runs on the data sets leave."""
    first, *others = [traces_of(data_set, settings, stop=stop) for data_set in data_sets]
    for other in others:
        assert other.said == first.said, "the data show in what is printed"
        assert list(other.files) == list(first.files), "the data show in the names of files"
        for path, found in first.files.items():
            assert other.files[path] == found, f"the data show in {path}"


def the_name_of_a_run_tells_nothing_of_its_data() -> None:
    rows = data(40)
    names = {traces_of(rows, [], name_key=key).name for key in (b"\1" * 32, b"\2" * 32)}
    assert len(names) == 2, "the name of the folder follows from the data"


def data(count: int) -> Rows:
    """Return labeled sentences of users with about three each."""
    return [
        (text, label, f"user {number // 3}")
        for number, (text, label) in enumerate(tiny.sentences(count, 1))
    ]


def traces_of(
    rows: Rows, settings: Sequence[str], *, stop: bool = False, name_key: bytes = b"\1" * 32
) -> Traces:
    """Tune privately in this process, and collect what is left.

    Args:
        rows: the private data.
        settings: more settings of the run file.
        stop: whether the run is asked to stop after two steps.
        name_key: the key of the names of folders.
    """
    with folder() as place:
        run = write_run(place, rows)
        (place / "runs" / "tiny").mkdir(parents=True)
        (place / "runs" / "tiny" / ".name_key").write_bytes(name_key)
        said = tune(run, settings, stop=stop)
        assert said[0] == (6 if stop else 0), said
        files = {}
        for path in sorted((place / "runs").rglob("*")):
            if path.name not in OWNERS_OWN:
                name = neutral(str(path.relative_to(place)), place)
                files[name] = (path.stat().st_mode, contents(path, place))
        (name,) = (path.name for path in place.glob("runs/tiny/tune-*"))
        return Traces((said[0], neutral(said[1], place)), files, name)


def write_run(place: Path, rows: Rows) -> Path:
    """Write a student, private data with users, and a run file."""
    tiny.write_model(place / "student", "llama", layers=2)
    write_public_prompt(place)
    lines = [f'"{text}",{label},{user}' for text, label, user in rows]
    (place / "private.csv").write_text("\n".join(["text,label,user", *lines, ""]))
    run = place / "run.yaml"
    run.write_text(
        """
name: tiny
inputs: {student: student, trust_model: true}
private_task:
  name: toy
  visibility: private
  path: private.csv
  template: "Review: {text} It was"
  labels: {0: [bad], 1: [good]}
  max_length: 48
tune: {num_virtual_tokens: 4, steps: 4, batch_size: 8, learning_rate: 0.01}
engine: {precision: fp32}
privacy:
  enabled: true
  noise_multiplier: 1.0
  declared_examples: 16
  target_delta: 1.0e-3
  ledger_anchors: anchors
"""
    )
    return run


def write_public_prompt(place: Path) -> None:
    """Write a public prompt for the student, with a head that is not zero."""
    from post_dist.artifacts.head import LinearHead
    from post_dist.artifacts.prompt import PUBLIC_PROMPT, PromptContents, Provenance, write_prompt
    from post_dist.artifacts.task import PromptTask
    from post_dist.models.load import load_tokenizer, tokenizer_fingerprint

    task = PromptTask("{text}", (("bad",), ("good",)), 48, False, "review")
    values = torch.arange(3 * 64, dtype=torch.float32).view(3, 2, 32) / 100
    head = LinearHead.untrained(values[2], 2).with_values(values[1] + 1, torch.ones(2))
    tokenizer = tokenizer_fingerprint(load_tokenizer(place / "student"))
    parents = {"teacher": "1" * 64, "student": "2" * 64}
    write_prompt(
        place / "public",
        PromptContents(torch.cat([values[0], values[2]]), task, None, head),
        Provenance("tiny", tokenizer, parents, {}),
        lambda artifact: None,
        PUBLIC_PROMPT,
    )


def tune(run: Path, settings: Sequence[str], *, stop: bool) -> tuple[int, str]:
    """Run the command in this process; return its exit code and everything that it said."""
    trainer = part("privacy.trainer")
    save = trainer.save_tensors

    def save_and_stop(checkpoints: Path, step: int, tensors: dict[str, Any]) -> None:
        save(checkpoints, step, tensors)
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    printed = io.StringIO()
    arguments = ["post-dist", "tune", str(run), *(f"--set={setting}" for setting in settings)]
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    logger = logging.getLogger("post_dist")
    try:
        with (
            mock.patch.object(sys, "argv", arguments),
            mock.patch.object(secrets, "token_bytes", lambda count: b"\7" * count),
            mock.patch.object(secrets, "token_hex", lambda count: "07" * count),
            mock.patch.object(trainer, "save_tensors", save_and_stop if stop else save),
            mock.patch.dict(os.environ),
            redirect_stdout(printed),
            redirect_stderr(printed),
        ):
            code = part("cli").run_command()
    finally:
        logger.handlers.clear()
        logger.propagate = True
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return code, printed.getvalue()


def contents(path: Path, place: Path) -> object:
    """Return what a file holds, without the noise and without what differs by chance."""
    if path.is_dir():
        return "a folder"
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        tensors = {}
        for name, tensor in load_file(path).items():
            noisy = NOISY.fullmatch(name) is not None
            tensors[name] = (tensor.dtype, tensor.shape, None if noisy else tensor.tolist())
        return metadata, tensors, path.stat().st_size
    return neutral(path.read_text(), place)


def neutral(text: str, place: Path) -> str:
    """Replace what differs between any two runs."""
    text = text.replace(str(place), "PLACE")
    for pattern, word in BY_CHANCE:
        text = re.sub(pattern, word, text)
    return text


CHECKS: list[Callable[[], None]] = [
    neighbors_leave_the_same_traces,
    the_name_of_a_run_tells_nothing_of_its_data,
]
