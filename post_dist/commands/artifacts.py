"""The commands for the demo's files, for checking artifacts, and for reports."""

import json
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from post_dist.commands.options import AsJson
from post_dist.commands.printing import print_numbers
from post_dist.config.assets import asset
from post_dist.errors import ArtifactRefused, InputError

_DEMO_FILES = ("demo.yaml", "fetch_demo.py")


def init(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Where to write it; made if missing.")
    ],
) -> None:
    """Write the demo's run file and its fetching script, to start your own from."""
    try:
        # All or nothing: no file is written if one of them would be overwritten.
        folder.mkdir(parents=True, exist_ok=True)
        for name in _DEMO_FILES:
            if (folder / name).exists():
                raise InputError(f"{folder / name} exists already", "give another folder")
        for name in _DEMO_FILES:
            shutil.copyfile(asset(f"examples/{name}"), folder / name)
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror or error}") from None
    print(f"python {folder / 'fetch_demo.py'}        fetches the demo's model and data")
    print(f"post-dist pipeline {folder / 'demo.yaml'}   runs it")


def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The artifact's folder.")],
    json_: AsJson = False,
) -> None:
    """Check an artifact: hashes, lineage, shapes, finite values, and its epsilon computed again."""
    from post_dist.verify import verify as check

    result = check(folder)
    print_numbers(result, json_)
    if not result["ok"]:
        raise typer.Exit(ArtifactRefused.exit_code)


def report(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="PATH...", help="Folders of runs, or files that `bench scale --write` has made."
        ),
    ],
    json_: AsJson = False,
) -> None:
    """Write the pages of finished runs again; merge `bench scale` files into a table and a plot."""
    from post_dist.report import finished_evaluation, write_report

    # A wrong path is found before the first page is written.
    for path in paths:
        if not path.exists():
            raise InputError(f"{path} is not there")
    folders = [path for path in paths if path.is_dir()]
    files = [path for path in paths if path.is_file()]
    # Folders are runs, and files are measurements; both may be given at once.
    pages = [str(write_report(finished_evaluation(folder))) for folder in folders]
    result: dict[str, Any] = {"reports": pages}
    if files:
        result |= _merge_measurements(files)
    if json_:
        print(json.dumps(result))
    else:
        _print_report(result)
    # The plot comes last: a table that is printed is not lost where the plot cannot be written.
    if files:
        from post_dist.planning.scaling import draw

        draw(result["scaling"], "measured", Path(result["figure"]))
        if not json_:
            print(f"figure: {result['figure']}")


def _merge_measurements(files: list[Path]) -> dict[str, Any]:
    """Merge what `bench scale` has measured on several numbers of ranks."""
    from post_dist.planning.scaling import measured

    return {"scaling": measured(files), "figure": str(files[0].with_name("scaling.png"))}


def _print_report(result: dict[str, Any]) -> None:
    from post_dist.planning.scaling import lines

    for page in result["reports"]:
        print(page)
    for line in lines(result.get("scaling", [])):
        print(line)
