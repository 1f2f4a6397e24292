"""The folder of a stage's run, `runs/<name>/<stage>-<first 8 digits of its signature>/`.

The signature covers the contents of the private data, and the name of a folder is printed and seen
by others. A plain hash would confirm a guess of the data. So the signature of a private stage is
keyed, with a random key that stays in `runs/<name>/`.
"""

import hashlib
import hmac
import json
import os
import platform
import re
import secrets
import stat
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from post_dist.artifacts.manifest import FILE_NAME
from post_dist.config.schema import STAGE_SECTIONS, Engine, RunConfig, Stage
from post_dist.config.yaml_files import write_yaml
from post_dist.errors import ArtifactRefused, EnvironmentFault
from post_dist.extras import installed_versions
from post_dist.files import FOLDER_MODE, digest_of, lock_file, make_folder, writing
from post_dist.paths import kind_of

_PACKAGES = ("post_dist", "torch", "transformers", "deepspeed", "datasets", "peft", "safetensors")

_WITHOUT_INFLUENCE = {"path", "ledger", "ledger_anchors", "max_total_epsilon"}
"""Fields that do not change the result of a stage. Files count by digest, not by path."""

SETTINGS = "resolved.yaml"
"""The file with the settings of a run, which every run folder has."""
ENVIRONMENT = "environment.json"
"""The file that says where the newest start of a run took place."""
ADMITTED = "admitted"
"""Folder beside the runs with the checked copies of students from other parties."""
LATEST = "latest"
"""Folder beside the runs with a link to the newest finished run of each stage."""
_LATER_FIELDS = {
    "attack_tokens",
    "comparison_noise_multiplier",
    "deduplicate",
    "deepspeed",
}
"""Fields that older versions do not have. Unset, they leave the signatures of older runs alone."""

RUN_MARKS = ("lock", ENVIRONMENT, SETTINGS)
"""Files that each run folder has from its beginning on."""
_RUN_NAME = re.compile(rf"(?:{'|'.join(STAGE_SECTIONS)})(?:-[a-z]+)?-[0-9a-f]{{8}}")

_NAME_KEY = ".name_key"
_KEY_BYTES = 32

_ENGINE_RESULTS = {"precision", "quantized_gathers", "deepspeed"}
"""Fields of `engine` that change results by more than rounding."""

_LAYOUT = {
    "corpus": {"workers"},
    "distill": {
        "micro_batch_size_per_gpu",
        "teacher_micro_batch_size_per_gpu",
        "checkpoint_every_steps",
        "cache_gib",
    },
    "transfer": {"prompts_at_once"},
    "engine": set(Engine.model_fields) - _ENGINE_RESULTS,
}
"""Fields that only divide the work. A run may resume with other values of them.

Private tuning is not listed, because a repeated step must be bit-equal.
"""


MEMBERSHIP = "membership.json"
"""The result of an audit by membership, which makes no artifact."""


def is_finished(run: Path) -> bool:
    """Return whether the run in a folder has its artifact, or the result of its audit."""
    results = (run / "artifact" / FILE_NAME, run / MEMBERSHIP)
    return any(kind_of(result) == "file" for result in results)


@dataclass(frozen=True)
class RunFolder:
    """The folder of a stage's run with one signature, which covers its settings and inputs.

    Attributes:
        path: path of the folder.
        stage: name of the stage.
        config: the sections of the run file that the stage may read.
        name_key: key of the folder's name; None for a stage without private data.
    """

    path: Path
    stage: Stage
    config: RunConfig
    name_key: bytes | None = field(default=None, repr=False)

    @property
    def artifact(self) -> Path:
        """The folder of the stage's result."""
        return self.path / "artifact"

    @property
    def checkpoints(self) -> Path:
        """The folder from which an unfinished run resumes. It is deleted when the run finishes."""
        return self.path / "checkpoints"

    @property
    def private(self) -> bool:
        """Whether the stage reads private data."""
        return self.config.private_task is not None

    @property
    def finished(self) -> bool:
        """Whether the artifact exists. It gets its name only when it is complete."""
        return kind_of(self.artifact / FILE_NAME) == "file"

    def link_latest(self) -> None:
        """Let `latest/<stage>` beside this folder lead to it, for people to type."""
        title, _, _ = self.path.name.rpartition("-")
        link = self.path.parent / LATEST / title
        partial = link.with_name(f".{self.path.name}")
        # A file system without links must not fail a finished run.
        with suppress(OSError):
            link.parent.mkdir(FOLDER_MODE, exist_ok=True)
            partial.unlink(missing_ok=True)
            partial.symlink_to(Path("..") / self.path.name)
            partial.replace(link)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Create and lock the folder, and write a description of the run into it.

        Two processes in one folder would delete each other's checkpoints. The lock ends with its
        process, even if that is killed. On a file system without locks, a warning is logged.

        Raises:
            InputError: the folder cannot be written to.
            EnvironmentFault: another process works in the folder, or has just finished its stage.
        """
        make_folder(self.path, 0o700 if self.private else FOLDER_MODE)
        with writing(self.path):
            if self.name_key is not None:
                _keep_name_key(self.path.parent, self.name_key)
            lock = (self.path / "lock").open("w")
        # The file stays open while the body runs, because closing it releases the lock.
        with lock:
            self._acquire(lock)
            # This process has looked before it had the lock. A finished stage must not run again.
            if self.finished:
                raise EnvironmentFault(
                    f"another process has just finished {self.stage} in {self.path}",
                    "run the same command again: it takes that result",
                )
            with writing(self.path):
                self._describe()
            yield

    def _acquire(self, lock: IO[str]) -> None:
        if not lock_file(lock):
            raise EnvironmentFault(
                f"another process works in {self.path}",
                "wait until it has ended, or give another --output",
            )

    def _describe(self) -> None:
        """Write the settings and the environment of the run."""
        # Other users must not read losses and batch sizes of the private stages, and must not put
        # another folder in the place of this one.
        if self.private:
            self.path.chmod(0o700)
            around = self.path.parent
            around.chmod(stat.S_IMODE(around.stat().st_mode) & ~0o022)
        environment = {
            "python": sys.version.split()[0],
            "platform": platform.platform(),
            "cpu_cores": os.cpu_count(),
            "packages": installed_versions(_PACKAGES),
            "slurm_job": os.environ.get("SLURM_JOB_ID"),
        }
        settings = self.config.model_dump(mode="json")
        (self.path / SETTINGS).write_text(write_yaml(settings))
        (self.path / ENVIRONMENT).write_text(json.dumps(environment, indent=2) + "\n")


def is_run(folder: Path) -> bool:
    """Return whether a folder is one that `RunFolder` makes, by its name and its files."""
    marks = [folder / name for name in RUN_MARKS]
    has_marks = all(mark.is_file() and not mark.is_symlink() for mark in marks)
    return _RUN_NAME.fullmatch(folder.name) is not None and has_marks


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
    view = config.view(stage)
    settings = influential_settings(config, stage)
    signature = digest_of({"stage": stage, "settings": settings, "inputs": dict(inputs)})
    title = f"{stage}-{label}" if label else stage
    around = config.output / config.name
    folder = RunFolder(around / f"{title}-{signature[:8]}", stage, view)
    # Version 0.1.0 did not key its names. Its runs are still found.
    if not folder.private or folder.path.exists():
        return folder
    key = _name_key(around)
    keyed = hmac.new(key, signature.encode(), hashlib.sha256).hexdigest()
    return replace(folder, path=around / f"{title}-{keyed[:8]}", name_key=key)


def influential_settings(config: RunConfig, stage: Stage) -> dict[str, Any]:
    """Return the settings that a stage's result depends on, by section.

    They are those of the sections that the stage reads, without the division of the work.
    """
    read: Any = {"seed", *STAGE_SECTIONS[stage]}
    layout: Any = _LAYOUT
    settings = config.view(stage).model_dump(mode="json", include=read, exclude=layout)
    kept: dict[str, Any] = _influential(settings)
    return kept


def sharding_settings(engine: Engine) -> dict[str, Any]:
    """Return the settings, besides the precision, that change the results of a sharded model.

    Caches of such results have them in their keys. Unset ones are left out, so the caches of older
    versions keep their keys.
    """
    fields = _ENGINE_RESULTS - {"precision"}
    given = engine.model_dump(mode="json", include=fields, exclude_defaults=True)
    return {name: value for name, value in given.items() if value}


def _name_key(around: Path) -> bytes:
    """Return the key of the folders in `runs/<name>/`: the kept one, or a new one.

    Raises:
        ArtifactRefused: the file does not hold a key.
    """
    path = around / _NAME_KEY
    if not path.exists():
        return secrets.token_bytes(_KEY_BYTES)
    key = path.read_bytes()
    if len(key) != _KEY_BYTES:
        raise ArtifactRefused(f"{path} does not hold a key", "give another --output")
    return key


def _keep_name_key(around: Path, key: bytes) -> None:
    """Write a new key into `runs/<name>/`, for its owner alone.

    Raises:
        EnvironmentFault: another process has written another key at the same time.
    """
    path = around / _NAME_KEY
    if not path.exists():
        # The file gets its name when it is whole: a run that is killed must leave a key or none.
        partial = path.with_name(f"{_NAME_KEY}.{secrets.token_hex(4)}")
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
            with os.fdopen(os.open(partial, flags, 0o600), "wb") as file:
                file.write(key)
            _name_once(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    if path.read_bytes() != key:
        raise EnvironmentFault(f"another process has just started in {around}", "start again")


def _name_once(partial: Path, path: Path) -> None:
    """Give a file its name, unless another process has given one to its own."""
    try:
        path.hardlink_to(partial)
    except FileExistsError:
        pass
    except OSError:
        # Not every file system has hard links. Then the last one wins.
        partial.rename(path)


def _influential(value: Any) -> Any:
    """Remove the settings that do not change the result of a stage, at any depth."""
    if not isinstance(value, dict):
        return value
    # Sections are mappings inside mappings.
    kept = {}
    for key, inner in value.items():
        is_unset_later = key in _LATER_FIELDS and not inner
        if key in _WITHOUT_INFLUENCE or is_unset_later:
            continue
        # The keys of `labels` are the owner's words, and not names of settings.
        kept[key] = labels_for_digest(inner) if key == "labels" else _influential(inner)
    return kept


def labels_for_digest(labels: dict[str, Any]) -> Any:
    """Return the labels of a task for a digest, which does not see the order of a mapping.

    Their order is that of the classes. In the order of the alphabet, the mapping says all.
    """
    if list(labels) == sorted(labels):
        return labels
    return [[label, words] for label, words in labels.items()]
