"""Find the files that are shipped beside the package: launch/, ds_configs/, slurm/, examples/."""

from pathlib import Path

from post_dist.errors import EnvironmentFault

# The folder of the package `post_dist` itself.
_PACKAGE = Path(__file__).resolve().parent.parent


def asset(name: str) -> Path:
    """Return the path of a shipped file or folder, such as `ds_configs/train.json`.

    A wheel has the files in `post_dist/_assets`. In a checkout they are beside the package.

    Raises:
        EnvironmentFault: the installation lacks the file.
    """
    for root in (_PACKAGE / "_assets", _PACKAGE.parent):
        path = root / name
        if path.exists():
            return path
    raise EnvironmentFault(f"the installation lacks {name}", "install post_dist again")
