"""What holds for the project as a whole."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import post_dist

ROOT = Path(__file__).resolve().parents[2]


WITHOUT_TORCH = """
import importlib, pkgutil, sys
import post_dist
heavy = {"torch", "transformers", "deepspeed", "datasets"}
for name in sys.argv[1:]:
    module = importlib.import_module(f"post_dist.{name}")
    for inner in pkgutil.walk_packages(getattr(module, "__path__", []), f"{module.__name__}."):
        importlib.import_module(inner.name)
    print(name, sorted(heavy & set(sys.modules)))
"""


def test_what_starts_a_command_loads_no_torch() -> None:
    """import-linter cannot say this: it counts an import inside a function as one of the module."""
    modules = [
        "errors",
        "files",
        "config",
        "artifacts.manifest",
        "artifacts.run_folder",
        "artifacts.card",
        "runtime.process",
        "runtime.ranks",
        "report",
        "losses.metric_labels",
        "api",
        "cluster",
        "commands",
        "cli",
    ]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *modules], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [f"{name} []" for name in modules]


def test_no_module_hides_an_import() -> None:
    """import-linter sees import statements alone."""
    hidden = re.compile(r"import_module\(|__import__\(")
    found = [
        path.name for path in (ROOT / "post_dist").rglob("*.py") if hidden.search(path.read_text())
    ]
    assert found == []


@pytest.mark.parametrize(
    "page",
    [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("ds_configs/*.md")],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_links_in_pages_lead_to_files_and_headings(page: Path) -> None:
    dead = []
    for link in re.findall(r"\]\((?!https?://)([^)]+)\)", page.read_text()):
        path, _, heading = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (heading and heading not in anchors(target)):
            dead.append(link)
    assert dead == []


def anchors(page: Path) -> set[str]:
    """The anchors that a site gives to the headings of a page."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_a_wheel_carries_the_files_beside_the_package(tmp_path: Path) -> None:
    import zipfile

    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--wheel-dir",
        str(tmp_path),
        str(ROOT),
    ]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
        names = set(archive.namelist())
    for folder in ("ds_configs", "examples", "launch", "slurm"):
        for file in (
            path
            for path in (ROOT / folder).rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        ):
            assert f"post_dist/_assets/{file.relative_to(ROOT)}" in names
    program = "from post_dist.config.assets import asset; print(asset('examples/demo.yaml'))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path / "installed",
        capture_output=True,
        text=True,
        check=True,
    )
    assert str(tmp_path / "installed") in done.stdout


def test_the_version_needs_no_command(main: Callable) -> None:
    assert main("--version") == (0, f"{post_dist.__version__}\n", "")
