"""The command `init`: a run file for the demo, or for a table of one's own."""

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from post_dist.commands.options import AsJson
from post_dist.commands.printing import print_json
from post_dist.config.assets import asset
from post_dist.config.presets import PresetName
from post_dist.errors import InputError, command_line
from post_dist.files import make_folder, write_file, writing
from post_dist.paths import kind_of

if TYPE_CHECKING:
    from post_dist.draft import Columns

_DEMO_FILES = ("demo.yaml", "fetch_demo.py")
_RUN_FILE = "run.yaml"


def init(  # noqa: PLR0913 - typer reads the options from parameters
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
    user: Annotated[
        str | None,
        typer.Option(metavar="COLUMN", help="Column of the users, if a user has several texts."),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="The student, or any other model to tune a prompt on."),
    ] = None,
    preset: Annotated[
        PresetName | None,
        typer.Option(help="Settings for your machine, or the paper's. Default: laptop."),
    ] = None,
    json_: AsJson = False,
) -> None:
    """Write a run file for your own table, or the demo's run file and download script."""
    if data is None:
        if text or label or user or model or preset:
            raise InputError(
                "--text, --label, --user, --model and --preset are for a table",
                "give it with --data",
            )
        files = _write_demo(folder)
        result: dict[str, Any] = {}
        run, script = files
        lines = [
            f"{command_line('python', script)}        fetches the demo's model and data",
            f"{command_line('post-dist', 'pipeline', run)}   runs it",
        ]
    else:
        # An edited run file is never overwritten.
        run = folder / _RUN_FILE
        if kind_of(run):
            raise InputError(f"{run} exists already", "give another folder")
        from post_dist.draft import draft_run  # loads torch

        # Draft first, so that wrong input leaves no folder behind.
        drafted = draft_run(folder, data, text, label, user, model, preset or "laptop")
        write_file(run, lambda partial: partial.write_text(drafted.text, encoding="utf-8"))
        files = [run]
        result = {"columns": asdict(drafted.columns)}
        lines = _after_draft(run, drafted.columns, names_model=model is not None)
    if json_:
        print_json({"run_file": files[0], "files": files} | result)
    else:
        print(*lines, sep="\n")


def _write_demo(folder: Path) -> list[Path]:
    """Write the demo's files, all of them or none. The run file is the first."""
    files = [folder / name for name in _DEMO_FILES]
    for file in files:
        if kind_of(file):
            raise InputError(f"{file} exists already", "give another folder")
    make_folder(folder)
    with writing(folder):
        for file in files:
            shutil.copyfile(asset(f"examples/{file.name}"), file)
    return files


def _after_draft(run: Path, columns: "Columns", *, names_model: bool) -> list[str]:
    """Say what to do with a drafted run file."""
    lines = [f"wrote {run}; it holds your labels and your table's rounded size, as the prompt will"]
    chosen = f"text = {columns.text}, label = {columns.label}"
    lines.append(chosen if columns.user is None else f"{chosen}, user = {columns.user}")
    if not names_model:
        lines.append("it names no model to tune on yet: name one in `inputs`")
    check = command_line("post-dist", "check", run)
    lines.append(f"{check}   lists what does not fit, and epsilon")
    tune = command_line("post-dist", "tune", run)
    lines.append(f"{tune}    tunes the prompt")
    return lines
