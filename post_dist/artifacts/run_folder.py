"""The folder of a stage's run, `runs/<name>/<stage>-<first 8 digits of its signature>/`."""

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
from typing import IO, Any

from post_dist.artifacts.manifest import FILE_NAME
from post_dist.config.schema import STAGE_SECTIONS, Engine, RunConfig, Stage
from post_dist.config.yaml_files import write_yaml
from post_dist.errors import EnvironmentFault
from post_dist.files import digest_of, writing

log = logging.getLogger(__name__)

_PACKAGES = ("post_dist", "torch", "transformers", "deepspeed", "datasets", "peft", "safetensors")

_WITHOUT_INFLUENCE = {"path", "ledger", "max_total_epsilon"}
"""Fields that do not change the result of a stage. Files count by digest, not by path."""

_LAYOUT = {
    "distill": {"micro_batch_size_per_gpu", "checkpoint_every_steps"},
    "transfer": {"prompts_at_once"},
    "engine": set(Engine.model_fields) - {"precision", "quantized_gathers"},
}
"""Fields that only divide the work. A run may resume with other values of them.

Private tuning is not listed, because a repeated step must be bit-equal.
"""


@dataclass(frozen=True)
class RunFolder:
    """The folder of a stage's run with one signature, which covers its settings and inputs.

    Attributes:
        path: path of the folder.
        stage: name of the stage.
        config: the sections of the run file that the stage may read.
    """

    path: Path
    stage: Stage
    config: RunConfig

    @property
    def artifact(self) -> Path:
        """The folder of the stage's result."""
        return self.path / "artifact"

    @property
    def checkpoints(self) -> Path:
        """The folder from which an unfinished run resumes. It is deleted when the run finishes."""
        return self.path / "checkpoints"

    @property
    def finished(self) -> bool:
        """Whether the artifact exists. It gets its name only when it is complete."""
        return (self.artifact / FILE_NAME).is_file()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Create and lock the folder, and write a description of the run into it.

        Two processes in one folder would delete each other's checkpoints. The lock ends with its
        process, even if that is killed. On a file system without locks, a warning is logged.

        Raises:
            InputError: the folder cannot be written to.
            EnvironmentFault: another process works in the folder.
        """
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / "lock").open("w")
        # The file stays open while the body runs, because closing it releases the lock.
        with lock:
            self._acquire(lock)
            with writing(self.path):
                self._describe()
            yield

    def _acquire(self, lock: IO[str]) -> None:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise EnvironmentFault(
                f"another process works in {self.path}",
                "wait until it has ended, or give another --output",
            ) from None
        except OSError as error:
            message = "%s cannot be locked: %s; make sure that no other process works in it"
            log.warning(message, self.path, error.strerror)

    def _describe(self) -> None:
        """Write the settings and the environment of the run."""
        # Other users must not read losses and batch sizes of the private stages.
        if self.config.private_task is not None:
            self.path.chmod(0o700)
        environment = {
            "python": sys.version.split()[0],
            "platform": platform.platform(),
            "cpu_cores": os.cpu_count(),
            "packages": {package: version(package) for package in _PACKAGES},
        }
        settings = self.config.model_dump(mode="json")
        (self.path / "resolved.yaml").write_text(write_yaml(settings))
        (self.path / "environment.json").write_text(json.dumps(environment, indent=2) + "\n")


def run_folder(
    config: RunConfig, stage: Stage, inputs: Mapping[str, str], label: str = ""
) -> RunFolder:
    """Return the folder for a stage with these settings and inputs.

    Args:
        config: the whole run file.
        stage: name of the stage.
        inputs: digest of each input of the stage, by its role.
        label: part of the folder's name, to mark a baseline's run of the stage.
    """
    # The signature covers the sections that the stage reads, without the division of the work.
    view = config.view(stage)
    read: Any = {"seed", *STAGE_SECTIONS[stage]}
    layout: Any = _LAYOUT
    settings = view.model_dump(mode="json", include=read, exclude=layout)
    signature = digest_of(
        {"stage": stage, "settings": _influential(settings), "inputs": dict(inputs)}
    )
    # The name reveals nothing about private data, because it has only the start of the signature.
    title = f"{stage}-{label}" if label else stage
    return RunFolder(config.output / config.name / f"{title}-{signature[:8]}", stage, view)


def _influential(value: object) -> object:
    """Remove the settings that do not change the result of a stage, at any depth."""
    if not isinstance(value, dict):
        return value
    # Sections are mappings inside mappings.
    kept = {}
    for key, inner in value.items():
        if key not in _WITHOUT_INFLUENCE:
            kept[key] = _influential(inner)
    return kept
