"""Packages that only some users need, and the extra of post_dist that installs each."""

import os
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from post_dist.errors import EnvironmentFault

_EXTRAS = {
    "datasets": "hub",
    "deepspeed": "provider",
    "matplotlib": "report",
    "mlflow": "track",
    "submitit": "slurm",
    "tensorboard": "track",
    "trackio": "track",
    "wandb": "track",
}
"""The extra of pyproject.toml for each package that is imported."""


def missing_package(error: ModuleNotFoundError) -> EnvironmentFault | None:
    """Return what to tell the user about a package that is not installed.

    Returns:
        None if the package belongs to no extra.
    """
    package = (error.name or "").partition(".")[0]
    extra = _EXTRAS.get(package)
    if extra is None:
        return None
    return EnvironmentFault(
        f"this needs the package {package}, which is not installed",
        f"pip install 'post_dist[{extra}]'",
    )


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """Return the versions of those packages that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def op_cache() -> Path:
    """Return the folder for DeepSpeed's compiled ops: TORCH_EXTENSIONS_DIR, or one beside Python.

    The ops belong to one Python environment. DeepSpeed's own default is in the home folder, where
    another environment would load them.
    """
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path(sys.prefix) / "torch_extensions")
