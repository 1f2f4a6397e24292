"""`post_dist.json`: what an artifact is, what it was made from, and the hash of each of its files.

An artifact is written to a temporary folder, which is hashed, flushed and then renamed. A folder
with a manifest is therefore complete.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from post_dist.artifacts.strict_json import parse_object
from post_dist.errors import ArtifactRefused
from post_dist.extras import installed_versions
from post_dist.files import digest_of, file_digest, file_digests, write_folder

ArtifactKind = Literal["student", "public prompt", "soft prompt", "evaluation"]

FILE_NAME = "post_dist.json"
SIGNATURE = f"{FILE_NAME}.sig"
"""Signature of the manifest, which `post-dist sign` adds. It is not one of the listed files."""
_SCHEMA_VERSION = 2
_PARTLY_HASHED = 1
"""The schema version whose digest covers neither settings nor tokenizer."""
PERPLEXITY = "perplexity"
"""Field of a student's settings for what attacks on it have reached."""
SIZE_LIMIT_BYTES = 1 << 20
"""Size limit of a manifest, which lists about ten files. A larger one is refused unparsed."""
_PACKAGES = ("post_dist", "torch", "transformers", "deepspeed", "peft")


@dataclass(frozen=True)
class Manifest:
    """The contents of `post_dist.json`.

    Attributes:
        kind: kind of the artifact.
        parents: sha256 of each input by its role. It is the `fingerprint` of a model, or the
            `Manifest.digest` of an artifact.
        config: the settings that made the artifact. No run computes any of them from private data.
        files: sha256 of each file by its path in the folder.
        tokenizer: `tokenizer_fingerprint` of the tokenizer that the artifact was made with.
        versions: version of each package that can change the artifact.
        schema_version: version of this file's format.
    """

    kind: ArtifactKind
    parents: dict[str, str]
    config: dict[str, Any]
    files: dict[str, str]
    tokenizer: str
    versions: dict[str, str]
    schema_version: int = _SCHEMA_VERSION

    @property
    def digest(self) -> str:
        """The artifact's own sha256, over the whole manifest but for the perplexity of a student.

        An attack on a finished student adds to its perplexities, and what was made with the student
        still belongs to it. What was made from an artifact of schema version 1 names the digest
        that it had then.
        """
        # Whoever changes the version of a newer manifest gets another digest too.
        if self.schema_version == _PARTLY_HASHED:
            return digest_of({"kind": self.kind, "files": self.files, "parents": self.parents})
        config = dict(self.config)
        if self.kind == "student":
            config.pop(PERPLEXITY, None)
        return digest_of(asdict(self) | {"config": config})

    @property
    def digest_covers_settings(self) -> bool:
        """Whether the digest changes with the settings."""
        return self.schema_version != _PARTLY_HASHED


def write_artifact(
    destination: Path,
    kind: ArtifactKind,
    fill: Callable[[Path], None],
    *,
    parents: Mapping[str, str],
    config: Mapping[str, Any],
    tokenizer: str = "",
    check: Callable[[Path], None] = lambda folder: None,
) -> Manifest:
    """Write an artifact folder with its manifest, atomically.

    Args:
        destination: the folder to create.
        kind: kind of the artifact.
        fill: writes all files but the manifest into a folder.
        parents: sha256 of each input by its role.
        config: the settings that made the artifact.
        tokenizer: fingerprint of its tokenizer, if it has one.
        check: reads the finished folder back before it is renamed, and raises an error to refuse
            it.

    Raises:
        InputError: the folder cannot be written to.
        EnvironmentFault: the disk is full.
    """
    versions = installed_versions(_PACKAGES)
    # `write_folder` returns nothing, so the inner function passes the manifest on in this list.
    written: list[Manifest] = []

    def fill_and_list(folder: Path) -> None:
        fill(folder)
        manifest = Manifest(
            kind=kind,
            parents=dict(parents),
            config=dict(config),
            files=file_digests(folder),
            tokenizer=tokenizer,
            versions=versions,
        )
        write_manifest(folder, manifest)
        # The check reads the folder with its manifest, as its receiver will.
        check(folder)
        # Its digest is that of the manifest as everybody else reads it.
        written.append(parse_manifest(folder / FILE_NAME))

    write_folder(destination, fill_and_list)
    return written[0]


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write a manifest into the folder of its artifact, which is not yet in its place."""
    text = json.dumps(asdict(manifest), indent=2, default=str)
    (folder / FILE_NAME).write_text(f"{text}\n")


def read_manifest(folder: Path, kind: ArtifactKind) -> Manifest:
    """Read a manifest and check every file of its folder against it.

    Args:
        folder: folder of the artifact, which is not trusted.
        kind: the expected kind.

    Raises:
        ArtifactRefused: the folder is not an artifact of this kind, or a file is missing, added or
            changed.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        raise ArtifactRefused(f"{folder} is not a post_dist artifact: it has no {FILE_NAME}")
    # The folder is not trusted, so the size is checked before the file is read.
    if path.stat().st_size > SIZE_LIMIT_BYTES:
        raise ArtifactRefused(f"{path} is larger than {SIZE_LIMIT_BYTES} bytes")
    manifest = parse_manifest(path)
    if manifest.kind != kind:
        raise ArtifactRefused(f"{folder} is a {manifest.kind}, not a {kind}")
    _check_files(folder, manifest)
    return manifest


def parse_manifest(path: Path) -> Manifest:
    """Read a manifest without looking at the files that it lists.

    Raises:
        ArtifactRefused: it is not a manifest of a known schema version.
    """
    refused = ArtifactRefused(f"{path} cannot be read as a manifest")
    try:
        manifest = Manifest(**parse_object(path.read_bytes()))
        # A dataclass does not check the types of its fields.
        has_known_kind = manifest.kind in get_args(ArtifactKind)
        texts = [manifest.tokenizer, *manifest.files.values(), *manifest.parents.values()]
        all_strings = all(isinstance(text, str) for text in texts)
        is_sound = has_known_kind and all_strings and isinstance(manifest.config, dict)
        is_sound = is_sound and type(manifest.schema_version) is int
    except (ValueError, TypeError, AttributeError):
        raise refused from None
    if not is_sound:
        raise refused
    if manifest.schema_version not in (_PARTLY_HASHED, _SCHEMA_VERSION):
        raise ArtifactRefused(
            f"{path} has schema version {manifest.schema_version}, "
            f"this post_dist reads {_PARTLY_HASHED} and {_SCHEMA_VERSION}"
        )
    return manifest


def _check_files(folder: Path, manifest: Manifest) -> None:
    """Compare the files of a folder with the list in its manifest."""
    entries = [entry for entry in folder.rglob("*") if not entry.is_dir()]
    present = {str(entry.relative_to(folder)) for entry in entries}
    present -= {FILE_NAME, SIGNATURE}

    # Names are compared first, because a file outside the manifest could hold anything.
    for name in sorted(present ^ set(manifest.files)):
        problem = "not in the manifest" if name in present else "missing"
        raise ArtifactRefused(f"{folder}: {name} is {problem}")

    # Then contents are compared. Links are refused, because they could lead to any file.
    for name, digest in manifest.files.items():
        if (folder / name).is_symlink() or file_digest(folder / name) != digest:
            raise ArtifactRefused(
                f"{folder}: {name} is not the file that was written", "get the artifact again"
            )
