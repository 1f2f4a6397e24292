"""The folder of one run of one stage: `runs/<name>/<stage>-<first 8 digits of its signature>/`."""

import fcntl
import json
import logging
import os
import platform
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import yaml

from post_dist.artifacts.manifest import FILE_NAME
from post_dist.config.schema import STAGE_SECTIONS, Engine, RunConfig, Stage
from post_dist.errors import EnvironmentFault
from post_dist.files import digest_of, writing

log = logging.getLogger(__name__)

_PACKAGES = ("post_dist", "torch", "transformers", "deepspeed", "datasets", "peft", "safetensors")
_WITHOUT_INFLUENCE = {"path", "ledger", "max_total_epsilon"}
_LAYOUT = {
    "distill": {"micro_batch_size_per_gpu", "checkpoint_every_steps"},
    "transfer": {"prompts_at_once"},
    "engine": set(Engine.model_fields) - {"precision", "quantized_gathers"},
}
"""How the work is shared out: a run may go on with another layout. Not so private tuning, where a repeated step must be bit-equal."""


@dataclass(frozen=True)
class RunFolder:
    """Where one signature of a stage leaves its work. A finished one has its artifact, whole."""

    path: Path
    stage: Stage
    config: RunConfig
    """The stage's view of the run file."""

    @property
    def artifact(self) -> Path:
        """The folder that the stage hands on."""
        return self.path / "artifact"

    @property
    def checkpoints(self) -> Path:
        """Where an unfinished run goes on from; removed when it is finished."""
        return self.path / "checkpoints"

    @property
    def finished(self) -> bool:
        """Whether the artifact is there; it is renamed into place only when it is whole."""
        return (self.artifact / FILE_NAME).is_file()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Make the folder, write down the settings and the environment, and keep other processes out meanwhile.

        Two in one folder would take each other's checkpoints away. A process that is killed lets go; a file system without locks keeps
        nobody out.

        Raises:
            InputError: the place cannot be written to.
            EnvironmentFault: another process works in it.
        """
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / "lock").open("w")
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise EnvironmentFault(
                    f"another process works in {self.path}",
                    "wait until it has ended, or give another --output",
                ) from None
            except OSError as error:
                log.warning(
                    "%s cannot be locked: %s; no other process may work in it",
                    self.path,
                    error.strerror,
                )
            with writing(self.path):
                self._describe()
            yield

    def _describe(self) -> None:
        environment = {
            "python": sys.version.split()[0],
            "platform": platform.platform(),
            "cpu_cores": os.cpu_count(),
            "packages": {package: version(package) for package in _PACKAGES},
        }
        if self.config.private_task is not None:
            self.path.chmod(0o700)
        (self.path / "resolved.yaml").write_text(
            yaml.safe_dump(self.config.model_dump(mode="json"), sort_keys=False)
        )
        (self.path / "environment.json").write_text(json.dumps(environment, indent=2) + "\n")


def run_folder(
    config: RunConfig, stage: Stage, inputs: Mapping[str, str], label: str = ""
) -> RunFolder:
    """The folder for `stage` with these settings and inputs.

    Args:
        config: the whole run file.
        stage: which of its stages.
        inputs: digest of each thing that the stage reads.
        label: set for a baseline's run of the stage, to tell its folder from the stage's own.
    """
    view = config.view(stage)
    settings = view.model_dump(
        mode="json", include={"seed", *STAGE_SECTIONS[stage]}, exclude=_LAYOUT
    )  # type: ignore[arg-type]
    signature = digest_of(
        {"stage": stage, "settings": _influential(settings), "inputs": dict(inputs)}
    )
    title = f"{stage}-{label}" if label else stage
    return RunFolder(config.output / config.name / f"{title}-{signature[:8]}", stage, view)


def _influential(value: object) -> object:
    """Drop settings that do not change what a stage makes; the digest of what a path holds stands in the inputs."""
    if isinstance(value, dict):
        return {
            key: _influential(inner)
            for key, inner in value.items()
            if key not in _WITHOUT_INFLUENCE
        }
    return value
