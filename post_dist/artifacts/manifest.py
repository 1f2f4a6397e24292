"""`post_dist.json`: what an artefact is, from which it descends, and the hash of each of its files.

An artefact is written beside its place, flushed, hashed, and renamed, so that a folder with a manifest is whole.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args
from uuid import uuid4

from safetensors import SafetensorError

from post_dist.errors import ArtefactRefused, EnvironmentFault, InputError

Kind = Literal["student", "soft prompt", "evaluation"]
FILE_NAME = "post_dist.json"
_SCHEMA_VERSION = 1
_MANIFEST_LIMIT_BYTES = 1 << 20
_PACKAGES = ("post_dist", "torch", "transformers", "deepspeed", "peft")
_SMALL_FILE_BYTES = 1 << 22


@dataclass(frozen=True)
class Manifest:
    """What `post_dist.json` says.

    Attributes:
        kind: what the folder holds.
        parents: for each input its role and sha256 (`fingerprint` of a model, `Manifest.digest` of an artefact).
        config: the settings that made it; never anything computed from private data.
        files: sha256 of each file by its path in the folder.
        tokenizer: `tokenizer_fingerprint` of the vocabulary that it belongs to.
    """

    kind: Kind
    parents: dict[str, str]
    config: dict[str, Any]
    files: dict[str, str]
    tokenizer: str
    versions: dict[str, str]
    schema_version: int = _SCHEMA_VERSION

    @property
    def digest(self) -> str:
        """The artefact's own sha256: over its kind, its files and its parents."""
        return digest_of({"kind": self.kind, "files": self.files, "parents": self.parents})


def digest_of(value: Any) -> str:
    """sha256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """sha256 of a file's contents."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(path: Path) -> str:
    """A digest of a file or model folder that is fast for weights of any size.

    Files up to 4 MiB are hashed whole; of a larger one its size and its first and last MiB.
    """
    if path.is_file():
        return file_digest(path)
    parts = {}
    for file in sorted(entry for entry in path.rglob("*") if entry.is_file()):
        size = file.stat().st_size
        if size <= _SMALL_FILE_BYTES:
            parts[str(file.relative_to(path))] = file_digest(file)
        else:
            with file.open("rb") as stream:
                head = stream.read(1 << 20)
                stream.seek(-(1 << 20), os.SEEK_END)
                parts[str(file.relative_to(path))] = f"{size} {hashlib.sha256(head + stream.read()).hexdigest()}"
    return digest_of(parts)


def write_folder(destination: Path, fill: Callable[[Path], None]) -> None:
    """Make a folder whole or not at all: fill a temporary one beside it, flush it to disk, rename it.

    Raises:
        InputError: the place cannot be written to.
        EnvironmentFault: the disk is full.
    """
    partial = destination.with_name(f".{destination.name}.partial")
    try:
        with writing(destination):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            fill(partial)
            put_in_place(partial, destination)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_file(destination: Path, fill: Callable[[Path], object]) -> None:
    """The same for a file. Several processes may make one at once: the last one's is kept.

    Raises:
        InputError: the place cannot be written to.
        EnvironmentFault: the disk is full.
    """
    partial = destination.with_name(f".{uuid4().hex[:8]}.{destination.name}")
    with writing(destination):
        try:
            destination.parent.mkdir(parents=True, exist_ok=True)
            fill(partial)
            _flush(partial)
            partial.rename(destination)
        finally:
            partial.unlink(missing_ok=True)
        _flush(destination.parent)


@contextmanager
def writing(destination: Path) -> Iterator[None]:
    """Turn what a disk answers into an error that says what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        if getattr(error, "errno", None) == errno.ENOSPC or os.strerror(errno.ENOSPC) in reason:
            raise EnvironmentFault(f"cannot write {destination}: the disk is full", "make room; the same command goes on") from None
        raise InputError(f"cannot write {destination}: {reason}", "give another --output") from None


def put_in_place(partial: Path, destination: Path) -> None:
    """Flush a folder that is whole to disk, and only then give it its name."""
    for path in [*partial.rglob("*"), partial]:
        _flush(path)
    partial.rename(destination)
    _flush(destination.parent)


def file_digests(folder: Path) -> dict[str, str]:
    """The sha256 of each file of a folder by its path in there."""
    return {str(path.relative_to(folder)): file_digest(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def write_artefact(
    destination: Path,
    kind: Kind,
    fill: Callable[[Path], None],
    *,
    parents: Mapping[str, str],
    config: Mapping[str, Any],
    tokenizer: str = "",
    check: Callable[[Path], None] = lambda folder: None,
) -> Manifest:
    """Write an artefact folder with its manifest, atomically.

    `fill` writes the other files; `check` reads all of them back before the folder gets its name, and raises if it must not.
    """
    written: list[Manifest] = []

    def fill_and_sign(folder: Path) -> None:
        fill(folder)
        files = file_digests(folder)
        versions = {package: version(package) for package in _PACKAGES}
        manifest = Manifest(kind, dict(parents), dict(config), files, tokenizer, versions)
        (folder / FILE_NAME).write_text(json.dumps(asdict(manifest), indent=2, default=str) + "\n")
        check(folder)
        written.append(manifest)

    write_folder(destination, fill_and_sign)
    return written[0]


def read_manifest(folder: Path, kind: Kind) -> Manifest:
    """Read a manifest of a kind and check every file of its folder against it.

    Raises:
        ArtefactRefused: no artefact, another kind, or a file that is missing, added or changed.
    """
    manifest = read_any_manifest(folder)
    if manifest.kind != kind:
        raise ArtefactRefused(f"{folder} is a {manifest.kind}, not a {kind}")
    return manifest


def read_any_manifest(folder: Path) -> Manifest:
    """The same for an artefact of any kind."""
    path = folder / FILE_NAME
    if not path.is_file():
        raise ArtefactRefused(f"{folder} is no post_dist artefact: it has no {FILE_NAME}")
    if path.stat().st_size > _MANIFEST_LIMIT_BYTES:
        raise ArtefactRefused(f"{path} is larger than {_MANIFEST_LIMIT_BYTES} bytes")
    try:
        fields = json.loads(path.read_text())
        manifest = Manifest(**fields)
        listed = {str(name): str(digest) for name, digest in manifest.files.items()}
        known = manifest.kind in get_args(Kind) and isinstance(manifest.parents, dict)
    except (ValueError, TypeError, AttributeError, RecursionError):
        known = False
    if not known:
        raise ArtefactRefused(f"{path} cannot be read as a manifest")
    if manifest.schema_version != _SCHEMA_VERSION:
        raise ArtefactRefused(f"{path} has schema version {manifest.schema_version}, this post_dist reads {_SCHEMA_VERSION}")
    present = {str(entry.relative_to(folder)) for entry in folder.rglob("*") if not entry.is_dir()} - {FILE_NAME}
    for name in sorted(present ^ set(listed)):
        raise ArtefactRefused(f"{folder}: {name} is {'not in the manifest' if name in present else 'missing'}")
    for name, digest in listed.items():
        if (folder / name).is_symlink() or file_digest(folder / name) != digest:
            raise ArtefactRefused(f"{folder}: {name} is not the file that was written", "get the artefact again")
    return manifest


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
