"""Copy a folder that comes from others into a private one, and read nothing but the copy.

A sender may list links, devices or endless files, and may change a file between two readings. So
each file is opened once, without following links, and hashed while it is copied. Only files with
known names come in.
"""

import errno
import hashlib
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from post_dist.admission.private_folder import private_folder
from post_dist.admission.signatures import check_signature
from post_dist.artifacts.manifest import (
    FILE_NAME,
    SIGNATURE,
    SIZE_LIMIT_BYTES,
    ArtifactKind,
    Manifest,
    parse_manifest,
)
from post_dist.errors import ArtifactRefused, EnvironmentFault, printable

_KIB = 1 << 10
_MIB = 1 << 20
_CHUNK_BYTES = 4 * _MIB
_BLOCK_BYTES = 512
"""Unit of `st_blocks`."""
_NEVER_SPARSE_BYTES = 16 * _MIB
_MOST_FILES = 300
"""Most entries of a folder; a model of 1 TB in files of 5 GB has about 200."""


@dataclass(frozen=True)
class FileRule:
    """What may come in under a name.

    Attributes:
        name: regular expression for the whole name.
        most_bytes: largest size.
        copied: whether anyone reads the file. The others are only hashed.
    """

    name: str
    most_bytes: int
    copied: bool = True


_CARD = FileRule(r"README\.md", _MIB, copied=False)
_MANIFEST = FileRule(re.escape(FILE_NAME), SIZE_LIMIT_BYTES)
_SIGNATURE = FileRule(re.escape(SIGNATURE), 16 * _KIB)
_PROMPT = (
    FileRule(r"adapter_model\.safetensors", 256 * _MIB),
    FileRule(r"head\.safetensors", 256 * _MIB),
    FileRule(r"(adapter_config|task|privacy)\.json", 64 * _KIB),
    _CARD,
)
# A LoRA or a prefix has the prompt in a file of its own. No public prompt has one of them.
_TUNED_PROMPT = (*_PROMPT, FileRule(r"prompt\.safetensors", 256 * _MIB))
_RULES: Mapping[ArtifactKind, tuple[FileRule, ...]] = {
    "soft prompt": _TUNED_PROMPT,
    "public prompt": _PROMPT,
    "evaluation": (FileRule(r"table\.json", 4 * _MIB),),
    "student": (
        FileRule(r"config\.json", 64 * _KIB),
        FileRule(r"tokenizer\.json", 64 * _MIB),
        FileRule(r"tokenizer_config\.json", 2 * _MIB),
        FileRule(r"model(-\d{5}-of-\d{5})?\.safetensors", 1 << 40),
        FileRule(r"model\.safetensors\.index\.json", 16 * _MIB),
        # The fast tokenizer of tokenizer.json needs none of these.
        FileRule(r"(generation_config|special_tokens_map|added_tokens)\.json", _MIB, copied=False),
        FileRule(r"(vocab\.json|vocab\.txt|merges\.txt)", 64 * _MIB, copied=False),
        FileRule(r"(tokenizer|spiece)\.model", 64 * _MIB, copied=False),
        FileRule(r"chat_template\.jinja", _MIB, copied=False),
        _CARD,
    ),
}


@dataclass(frozen=True)
class Quarantined:
    """The private copy of a folder.

    Attributes:
        folder: the copy, which only this user can read.
        manifest: its manifest. The hashes of all files have been compared with it.
        signature: what is known of its signer, in words.
    """

    folder: Path
    manifest: Manifest
    signature: str


@contextmanager
def quarantined(
    folder: Path,
    parent: Path | None = None,
    *,
    keys: Sequence[str] = (),
    only: frozenset[str] | None = None,
    hashed_only: bool = False,
    signature_counts: bool = True,
) -> Iterator[Quarantined]:
    """Copy an artifact, and delete the copy afterwards.

    Args:
        folder: the artifact, which is not trusted.
        parent: where to make the copy; None for the folder of temporary files.
        keys: trusted public keys, one of which must have signed it; none to take unsigned ones.
        only: names of the files to copy and to check, besides the manifest; None for all.
        hashed_only: whether to compare the files with their hashes, and to copy none.
        signature_counts: whether to check the signature, if there is one.

    Raises:
        ArtifactRefused: the folder holds anything but the files of one artifact, each of them
            regular, within its size and with the hash that the manifest gives. Or its signature is
            not good, or not by a trusted key.
    """
    with private_folder(parent) as copy:
        yield _copy(
            folder, copy, keys, only, hashed_only=hashed_only, signature_counts=signature_counts
        )


def _copy(
    folder: Path,
    copy: Path,
    keys: Sequence[str],
    only: frozenset[str] | None,
    *,
    hashed_only: bool,
    signature_counts: bool,
) -> Quarantined:
    try:
        root = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise ArtifactRefused(f"it cannot be opened: {error.strerror}") from None
    try:
        names = _names(root)
        if FILE_NAME not in names:
            raise ArtifactRefused(f"it is not a post_dist artifact: it has no {FILE_NAME}")
        _copy_file(root, FILE_NAME, _MANIFEST, copy / FILE_NAME)
        if signature_counts and SIGNATURE in names:
            _copy_file(root, SIGNATURE, _SIGNATURE, copy / SIGNATURE)
        # Nothing that a stranger has sent is parsed if keys are given.
        signature = check_signature(copy, keys)
        manifest = parse_manifest(copy / FILE_NAME)
        present = names - {FILE_NAME, SIGNATURE}
        listed = manifest.files
        # The weights of a student may take minutes to copy, and not every command reads them.
        if only is not None:
            present &= only
            listed = {name: digest for name, digest in listed.items() if name in only}
        for name in sorted(present ^ set(listed)):
            problem = "not in the manifest" if name in present else "missing"
            raise ArtifactRefused(f"{printable(name)[:100]} is {problem}")
        _copy_listed(root, listed, manifest.kind, None if hashed_only else copy)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise EnvironmentFault(
                f"no room for a copy in {copy.parent}", "free some space"
            ) from None
        raise ArtifactRefused(f"a file cannot be read: {error.strerror or error}") from None
    finally:
        os.close(root)
    return Quarantined(copy, manifest, signature)


def _names(root: int) -> set[str]:
    """Return the names in a folder, which must be few."""
    names = set()
    with os.scandir(root) as entries:
        for entry in entries:
            names.add(entry.name)
            if len(names) > _MOST_FILES:
                raise ArtifactRefused(f"it holds more than {_MOST_FILES} files")
    return names


def _copy_listed(
    root: int, listed: Mapping[str, str], kind: ArtifactKind, copy: Path | None
) -> None:
    """Copy files unless `copy` is None, and compare each with its digest."""
    # Small files come first, so that a hostile one costs no time.
    rules = {name: _rule_of(name, kind) for name in listed}
    for name in sorted(listed, key=lambda name: (rules[name].most_bytes, name)):
        digest = _copy_file(root, name, rules[name], None if copy is None else copy / name)
        if digest != listed[name]:
            raise ArtifactRefused(
                f"{name} is not the file that was written", "get the artifact again"
            )


def _rule_of(name: str, kind: ArtifactKind) -> FileRule:
    for rule in _RULES[kind]:
        if re.fullmatch(rule.name, name):
            return rule
    raise ArtifactRefused(f"{printable(name)[:100]} is not a file of a {kind}")


def _copy_file(root: int, name: str, rule: FileRule, destination: Path | None) -> str:
    """Copy one file while it is hashed, and return its sha256.

    Args:
        root: descriptor of the folder.
        name: name of the file.
        rule: its largest size, and whether to keep the copy.
        destination: the copy; None to hash the file alone.
    """
    # Without O_NONBLOCK, opening a FIFO would wait for a writer.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    # Opening a device may act on it, so its kind is looked at before and after.
    _check_regular(name, os.stat(name, dir_fd=root, follow_symlinks=False))
    with open(os.open(name, flags, dir_fd=root), "rb") as source:
        status = os.fstat(source.fileno())
        _check_regular(name, status)
        if status.st_size > rule.most_bytes:
            raise ArtifactRefused(f"{name} is larger than {rule.most_bytes} bytes")
        # A file of zeros costs its sender nothing, and us the time and the disk of its whole size.
        on_disk = status.st_blocks * _BLOCK_BYTES
        if status.st_size > _NEVER_SPARSE_BYTES and on_disk < status.st_size // 4:
            raise ArtifactRefused(f"{name} is sparse: it holds {on_disk} of its bytes")
        digest = hashlib.sha256()
        copied = rule.copied and destination is not None
        with open(destination if copied else os.devnull, "wb") as copy:
            # A file that grows while it is read has another hash in the end.
            left = status.st_size
            while left > 0 and (chunk := source.read(min(left, _CHUNK_BYTES))):
                digest.update(chunk)
                copy.write(chunk)
                left -= len(chunk)
    return digest.hexdigest()


def _check_regular(name: str, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise ArtifactRefused(f"{name} is not a regular file")
