"""`post_dist.json`: what an artifact is, from which it descends, and the hash of each of its files.

An artifact is written beside its place, flushed, hashed, and renamed, so that a folder with a manifest is whole.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

from post_dist.errors import ArtifactRefused
from post_dist.files import digest_of, file_digest, file_digests, write_folder

Kind = Literal["student", "soft prompt", "evaluation"]
FILE_NAME = "post_dist.json"
_SCHEMA_VERSION = 1
_MANIFEST_LIMIT_BYTES = 1 << 20
_PACKAGES = ("post_dist", "torch", "transformers", "deepspeed", "peft")


@dataclass(frozen=True)
class Manifest:
    """What `post_dist.json` says.

    Attributes:
        kind: what the folder holds.
        parents: for each input its role and sha256 (`fingerprint` of a model, `Manifest.digest` of an artifact).
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
        """The artifact's own sha256: over its kind, its files and its parents."""
        return digest_of({"kind": self.kind, "files": self.files, "parents": self.parents})


def write_artifact(
    destination: Path,
    kind: Kind,
    fill: Callable[[Path], None],
    *,
    parents: Mapping[str, str],
    config: Mapping[str, Any],
    tokenizer: str = "",
    check: Callable[[Path], None] = lambda folder: None,
) -> Manifest:
    """Write an artifact folder with its manifest, atomically.

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
        ArtifactRefused: no artifact, another kind, or a file that is missing, added or changed.
    """
    manifest = read_any_manifest(folder)
    if manifest.kind != kind:
        raise ArtifactRefused(f"{folder} is a {manifest.kind}, not a {kind}")
    return manifest


def read_any_manifest(folder: Path) -> Manifest:
    """The same for an artifact of any kind."""
    path = folder / FILE_NAME
    if not path.is_file():
        raise ArtifactRefused(f"{folder} is no post_dist artifact: it has no {FILE_NAME}")
    if path.stat().st_size > _MANIFEST_LIMIT_BYTES:
        raise ArtifactRefused(f"{path} is larger than {_MANIFEST_LIMIT_BYTES} bytes")
    try:
        fields = json.loads(path.read_text())
        manifest = Manifest(**fields)
        listed = {str(name): str(digest) for name, digest in manifest.files.items()}
        known = manifest.kind in get_args(Kind) and isinstance(manifest.parents, dict)
    except (ValueError, TypeError, AttributeError, RecursionError):
        known = False
    if not known:
        raise ArtifactRefused(f"{path} cannot be read as a manifest")
    if manifest.schema_version != _SCHEMA_VERSION:
        raise ArtifactRefused(
            f"{path} has schema version {manifest.schema_version}, this post_dist reads {_SCHEMA_VERSION}"
        )
    present = {
        str(entry.relative_to(folder)) for entry in folder.rglob("*") if not entry.is_dir()
    } - {FILE_NAME}
    for name in sorted(present ^ set(listed)):
        raise ArtifactRefused(
            f"{folder}: {name} is {'not in the manifest' if name in present else 'missing'}"
        )
    for name, digest in listed.items():
        if (folder / name).is_symlink() or file_digest(folder / name) != digest:
            raise ArtifactRefused(
                f"{folder}: {name} is not the file that was written", "get the artifact again"
            )
    return manifest
