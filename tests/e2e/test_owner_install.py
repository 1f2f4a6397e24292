"""A data owner installs post_dist alone: no DeepSpeed, no submitit, no datasets, no matplotlib."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

ROOT = Path(__file__).resolve().parents[2]
EXTRAS = re.compile(r"(deepspeed|submitit|datasets|matplotlib)\b")
START = """
import sys
sys.path[:] = [*sys.argv[1:3], *(path for path in sys.path if "site-packages" not in path)]
sys.argv[:] = ["post-dist", *sys.argv[3:]]
from post_dist.cli import main
main()
"""


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """A folder of installed packages without those of the extras."""
    folder = tmp_path / "packages"
    folder.mkdir()
    for path in sys.path:
        # Some packages add folders inside of theirs.
        if Path(path).name != "site-packages":
            continue
        for package in Path(path).iterdir():
            if not EXTRAS.match(package.name):
                (folder / package.name).symlink_to(package)
    return folder


def post_dist_of_owner(packages: Path, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-S", "-c", START, ROOT, packages, *arguments]
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=300, check=False
    )


def test_an_owner_tunes_without_the_extras(packages: Path, tmp_path: Path) -> None:
    run = tiny.write_run(tmp_path)
    student = tiny.write_student(tmp_path / "student")
    options = (f"--set=inputs.student={student}", "--output", tmp_path / "runs")
    private = ("--set=privacy.enabled=true", "--set=privacy.noise_multiplier=1")
    declared = ("--set=privacy.declared_examples=160",)
    done = post_dist_of_owner(packages, "tune", run, *options, *private, *declared)
    assert done.returncode == 0, done.stderr
    (prompt,) = (tmp_path / "runs").glob("tiny/tune-*/artifact")
    assert post_dist_of_owner(packages, "verify", prompt).returncode == 0


def test_the_doctor_says_that_an_owner_needs_no_deepspeed(packages: Path) -> None:
    done = post_dist_of_owner(packages, "doctor")
    assert "ok   deepspeed: none: an owner needs none to tune, evaluate or predict" in done.stdout


@pytest.mark.parametrize(
    ("command", "package", "extra"),
    [("distill", "deepspeed", "provider"), ("submit", "submitit", "slurm")],
)
def test_a_missing_package_is_named_with_its_extra(
    packages: Path, tmp_path: Path, command: str, package: str, extra: str
) -> None:
    run = tiny.write_run(tmp_path)
    stage = ("distill", "--print") if command == "submit" else ()
    refused = post_dist_of_owner(packages, command, run, *stage)
    assert refused.returncode == 3, refused.stderr
    assert f"this needs the package {package}, which is not installed" in refused.stderr
    assert f"pip install 'post_dist[{extra}]'" in refused.stderr
    assert "Traceback" not in refused.stderr
