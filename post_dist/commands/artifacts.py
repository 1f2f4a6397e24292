"""What goes into a run and what comes out of it: the demo's files, checked artifacts, and reports."""

import json
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from post_dist.commands.options import AsJson
from post_dist.commands.printing import print_numbers
from post_dist.config.assets import asset
from post_dist.errors import ArtifactRefused, InputError


def init(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Where to write it; made if missing.")
    ],
) -> None:
    """Write the demo's run file and its fetching script, to start your own from."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("demo.yaml", "fetch_demo.py"):
            if (folder / name).exists():
                raise InputError(f"{folder / name} exists already", "give another folder")
        for name in ("demo.yaml", "fetch_demo.py"):
            shutil.copyfile(asset(f"examples/{name}"), folder / name)
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror or error}") from None
    print(f"python {folder / 'fetch_demo.py'}        fetches the demo's model and data")
    print(f"post-dist pipeline {folder / 'demo.yaml'}   runs it")


def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The artifact's folder.")],
    json_: AsJson = False,
) -> None:
    """Check an artifact: hashes, lineage, shapes, finite values, and epsilon computed again from its own figures."""
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
    """Write the pages of finished runs again; merge measurements on several numbers of ranks into a table and a figure."""
    from post_dist.planning.scaling import draw, lines, measured
    from post_dist.report import finished_evaluation, write_report

    missing = [path for path in paths if not path.exists()]
    if missing:
        raise InputError(f"{missing[0]} is not there")
    pages = [str(write_report(finished_evaluation(path))) for path in paths if path.is_dir()]
    files = [path for path in paths if path.is_file()]
    result: dict[str, Any] = {"reports": pages}
    if files:
        rows = measured(files)
        result |= {"scaling": rows, "figure": str(files[0].with_name("scaling.png"))}
    if json_:
        print(json.dumps(result))
    else:
        print(*pages, sep="\n", end="\n" if pages else "")
        print(*lines(result.get("scaling", [])), sep="\n", end="\n" if files else "")
    if files:
        draw(result["scaling"], "measured", Path(result["figure"]))
        if not json_:
            print(f"figure: {result['figure']}")
