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
from typing import IO, Any

from post_dist.artifacts.manifest import FILE_NAME
from post_dist.config.schema import STAGE_SECTIONS, Engine, RunConfig, Stage
from post_dist.config.yaml_files import write_yaml
from post_dist.errors import EnvironmentFault
from post_dist.files import digest_of, writing

log = logging.getLogger(__name__)

_PACKAGES = ("post_dist", "torch", "transformers", "deepspeed", "datasets", "peft", "safetensors")

_WITHOUT_INFLUENCE = {"path", "ledger", "max_total_epsilon"}
"""Fields that do not change what a stage makes. The inputs hold the digest of what a path names."""

_LAYOUT = {
    "distill": {"micro_batch_size_per_gpu", "checkpoint_every_steps"},
    "transfer": {"prompts_at_once"},
    "engine": set(Engine.model_fields) - {"precision", "quantized_gathers"},
}
"""Fields that say how the work is divided. A run may resume with another layout. Private tuning is
not listed: a step that it repeats must be bit-equal."""


@dataclass(frozen=True)
class RunFolder:
    """The folder in which one signature of a stage leaves its work.

    Attributes:
        path: the folder.
        stage: the stage.
        config: the stage's view of the run file.
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
        """The folder from which an unfinished run resumes; removed when the run is finished."""
        return self.path / "checkpoints"

    @property
    def finished(self) -> bool:
        """Whether the artifact is there; it gets its name only when it is complete."""
        return (self.artifact / FILE_NAME).is_file()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Create the folder, describe the run in it, and keep other processes out.

        Two processes in one folder would delete each other's checkpoints. The lock ends with its
        process, also when that is killed. A file system without locks keeps nobody out.

        Raises:
            InputError: the place cannot be written to.
            EnvironmentFault: another process works in the folder.
        """
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / "lock").open("w")
        # The lock is held until the body has run.
        with lock:
            self._take(lock)
            with writing(self.path):
                self._describe()
            yield

    def _take(self, lock: IO[str]) -> None:
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
        # Losses and batch sizes of the private stages must not be readable by other users.
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
        stage: which of its stages.
        inputs: digest of each thing that the stage reads.
        label: set for a baseline's run of the stage, to tell its folder from the stage's own.
    """
    # The signature covers the sections that the stage reads, without the layout of the work.
    view = config.view(stage)
    read: Any = {"seed", *STAGE_SECTIONS[stage]}
    layout: Any = _LAYOUT
    settings = view.model_dump(mode="json", include=read, exclude=layout)
    signature = digest_of(
        {"stage": stage, "settings": _influential(settings), "inputs": dict(inputs)}
    )
    # The name holds nothing of the private data, only the start of the signature.
    title = f"{stage}-{label}" if label else stage
    return RunFolder(config.output / config.name / f"{title}-{signature[:8]}", stage, view)


def _influential(value: object) -> object:
    """Drop the settings that do not change what a stage makes, at any depth."""
    if not isinstance(value, dict):
        return value
    # Sections are mappings inside mappings.
    kept = {}
    for key, inner in value.items():
        if key not in _WITHOUT_INFLUENCE:
            kept[key] = _influential(inner)
    return kept
