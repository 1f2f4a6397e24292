"""The commands `verify`, `sign` and `report`: artifacts, and pages of finished runs."""

from pathlib import Path
from typing import Annotated, Any

import typer

from post_dist.artifacts.manifest import SIGNATURE
from post_dist.commands.options import AsJson, TrustedKeys
from post_dist.commands.printing import print_json, print_numbers, refuse
from post_dist.config.public_keys import read_public_key
from post_dist.errors import ArtifactRefused, InputError
from post_dist.files import remove_unfinished
from post_dist.paths import kind_of

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The artifact's folder.")]


def verify(
    folder: Folder,
    key: TrustedKeys = None,
    json_: AsJson = False,
) -> None:
    """Check an artifact: hashes, signature, lineage, finite values, and its recomputed epsilon."""
    from post_dist.verify import verify as check

    result = check(folder, [read_public_key(each) for each in key or []])
    print_numbers(result, json_)
    if not result["ok"]:
        raise typer.Exit(ArtifactRefused.exit_code)


def sign(
    folder: Folder,
    key: Annotated[
        Path,
        typer.Option(
            "--key", metavar="FILE", help="A private key of ssh-keygen, such as ~/.ssh/id_ed25519."
        ),
    ],
    json_: AsJson = False,
) -> None:
    """Sign an artifact with an ssh key, for a receiver that knows your public key."""
    from post_dist.admission.signatures import sign as sign_artifact
    from post_dist.verify import verified_manifest

    # What a killed `sign` has left is no file of the artifact.
    remove_unfinished(folder / SIGNATURE)
    # The signature that it has is replaced, and may be damaged.
    result, manifest = verified_manifest(folder, signature_counts=False)
    if not result["ok"]:
        refusal = ArtifactRefused(f"{folder} is not signed, because `verify` refuses it")
        refuse(result, refusal, json_)
    signer = sign_artifact(folder, key.expanduser(), manifest)
    if json_:
        print_json({"path": folder, "signature": folder / SIGNATURE, "signer": signer})
    else:
        print(f"{folder}: signed by {signer}")


def report(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="PATH...", help="Run folders such as runs/demo, or files of `bench scale`."
        ),
    ],
    json_: AsJson = False,
) -> None:
    """Rewrite the pages of finished runs. Merge `bench scale` files into a table and a plot."""
    from post_dist.report import finished_evaluation, write_report

    # Check all paths before the first page is written.
    for path in paths:
        if not kind_of(path):
            raise InputError(f"{path} does not exist")
    folders = [path for path in paths if kind_of(path) == "folder"]
    files = [path for path in paths if kind_of(path) == "file"]
    # Folders are runs, and files are measurements. A user may give both.
    # A file that is refused leaves all pages as they are.
    merged = _merge_measurements(files) if files else {}
    pages = [write_report(finished_evaluation(folder)) for folder in folders]
    result: dict[str, Any] = {"reports": pages} | merged
    # If the plot cannot be written, the table is already printed. JSON is the result or the error.
    if not json_:
        _print_report(result)
    if files:
        from post_dist.planning.scaling import draw

        draw(result["scaling"], "measured", result["figure"])
        if not json_:
            print(f"figure: {result['figure']}")
    if json_:
        print_json(result)


def _merge_measurements(files: list[Path]) -> dict[str, Any]:
    """Merge the measurements of `bench scale` on different numbers of ranks."""
    from post_dist.planning.scaling import measured

    return {"scaling": measured(files), "figure": files[0].with_name("scaling.png")}


def _print_report(result: dict[str, Any]) -> None:
    for page in result["reports"]:
        print(page)
    if "scaling" in result:
        from post_dist.planning.scaling import scaling_lines  # loads torch

        for line in scaling_lines(result["scaling"]):
            print(line)
