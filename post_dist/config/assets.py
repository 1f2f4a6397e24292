"""Where the files beside the package are: `launch/`, `ds_configs/`, `slurm/` and `examples/`."""

from pathlib import Path

from post_dist.errors import EnvironmentFault

_PACKAGE = Path(__file__).resolve().parent.parent


def asset(name: str) -> Path:
    """The path of a shipped file or folder, such as `ds_configs/train_zero1.json`.

    A wheel carries them in `post_dist/_assets`; in a checkout they lie beside the package.

    Raises:
        EnvironmentFault: the installation lacks it.
    """
    for root in (_PACKAGE / "_assets", _PACKAGE.parent):
        if (root / name).exists():
            return root / name
    raise EnvironmentFault(f"the installation lacks {name}", "install post_dist again")
