"""The command `init`: a run file for the demo, or for a table of one's own."""

import shutil
from pathlib import Path
from typing import Annotated

import typer

from post_dist.config.assets import asset
from post_dist.config.presets import PresetName
from post_dist.errors import InputError
from post_dist.files import write_file

_DEMO_FILES = ("demo.yaml", "fetch_demo.py")
_RUN_FILE = "run.yaml"


def init(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder for the files; created if missing.")
    ],
    data: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Your table of labeled texts: CSV, TSV, JSONL, Parquet."),
    ] = None,
    text: Annotated[str | None, typer.Option(metavar="COLUMN", help="Column of the texts.")] = None,
    label: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Column of the labels.")
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="The student, or any other model to tune a prompt on."),
    ] = None,
    preset: Annotated[
        PresetName | None,
        typer.Option(help="Settings for your machine, or the paper's. Default: laptop."),
    ] = None,
) -> None:
    """Write a run file for your own table, or the demo's run file and download script."""
    if data is None:
        if text or label or model or preset:
            raise InputError(
                "--text, --label, --model and --preset are for a table", "give it with --data"
            )
        _write_demo(folder)
        return
    # An edited run file is never overwritten.
    run = folder / _RUN_FILE
    if run.exists():
        raise InputError(f"{run} exists already", "give another folder")
    from post_dist.draft import draft_run  # loads torch

    # Draft first, so that wrong input leaves no folder behind.
    drafted = draft_run(folder, data, text, label, model, preset or "laptop")
    write_file(run, lambda partial: partial.write_text(drafted, encoding="utf-8"))
    print(f"wrote {run}; it holds the values of your label column, as the prompt will")
    if model is None:
        print("it names no model to tune on yet: name one in `inputs`")
    print(f"post-dist check {run}   lists what does not fit, and epsilon")
    print(f"post-dist tune {run}    tunes the prompt")


def _write_demo(folder: Path) -> None:
    """Write the demo's files, all of them or none."""
    for name in _DEMO_FILES:
        if (folder / name).exists():
            raise InputError(f"{folder / name} exists already", "give another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in _DEMO_FILES:
            shutil.copyfile(asset(f"examples/{name}"), folder / name)
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror or error}") from None
    print(f"python {folder / 'fetch_demo.py'}        fetches the demo's model and data")
    print(f"post-dist pipeline {folder / 'demo.yaml'}   runs it")
