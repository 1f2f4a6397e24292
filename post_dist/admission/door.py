"""Admit an artifact of another party: everything is read from a private copy, and checked there."""

import logging
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from post_dist.admission.quarantine import Quarantined, quarantined
from post_dist.admission.refusal import refusing
from post_dist.artifacts.head import LinearHead
from post_dist.artifacts.lora import Lora
from post_dist.artifacts.manifest import FILE_NAME, SIGNATURE, ArtifactKind, Manifest
from post_dist.artifacts.prefix import Prefix
from post_dist.artifacts.prompt import PRIVACY, SoftPromptArtifact, read_prompt_files
from post_dist.config.stages import AdapterName
from post_dist.errors import ArtifactRefused, printable
from post_dist.files import make_folder, put_in_place

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

_DESCRIPTION = frozenset(("config.json", "tokenizer.json", "tokenizer_config.json"))
"""The files of a student without its weights."""
_SHA256 = re.compile(r"[0-9a-f]{64}")
_PERPLEXITY = re.compile(r"teacher|student( after [0-9]{1,18} more tokens)?")
"""Names of the models whose perplexity a student's manifest states."""
_ADAPTERS: Mapping[type, AdapterName] = {
    type(None): "prompt",
    LinearHead: "head",
    Lora: "lora",
    Prefix: "prefix",
}
"""What `tune.adapter` calls each kind of adapter."""
_PARENTS = {
    "student": {"teacher"},
    "public prompt": {"teacher", "student"},
    "soft prompt": {"model"},
    "evaluation": {"teacher", "student"},
}
"""For each kind of artifact, the parents that its lineage must name."""


def admit_prompt(
    folder: Path, kind: ArtifactKind = "soft prompt", keys: Sequence[str] = ()
) -> SoftPromptArtifact:
    """Read a prompt of another party, and check what it claims.

    Args:
        folder: the prompt, which is not trusted.
        kind: the kind of artifact that it must be.
        keys: trusted public keys, one of which must have signed it; none to take unsigned ones.

    Raises:
        ArtifactRefused: a check failed.
    """
    with refusing(folder), quarantined(folder, keys=keys) as inside:
        log.info("%s: %s", folder, inside.signature)
        _check_lineage(inside.manifest)
        return check_prompt(inside, kind)


def check_prompt(inside: Quarantined, kind: ArtifactKind) -> SoftPromptArtifact:
    """Read a quarantined prompt, and compare its epsilon with what was spent.

    Raises:
        ArtifactRefused: a check failed.
    """
    from post_dist.privacy.statement import (  # takes seconds to import
        settings_problems,
        statement_problems,
    )

    if inside.manifest.kind != kind:
        raise ArtifactRefused(f"it is a {inside.manifest.kind}, not a {kind}")
    prompt = read_prompt_files(inside.folder, inside.manifest)
    if prompt.privacy is not None:
        problems = statement_problems(prompt.privacy)
        problems += settings_problems(prompt.privacy, inside.manifest.config)
        if _lacks_privacy_settings(inside.manifest):
            problems.append("the manifest does not hold the settings of its privacy")
        if problems:
            raise ArtifactRefused(f"{PRIVACY}: {'; '.join(problems)}")
    problems = _tuning_problems(prompt)
    if problems:
        raise ArtifactRefused(f"{FILE_NAME}: {'; '.join(problems)}")
    return prompt


def _lacks_privacy_settings(manifest: Manifest) -> bool:
    """Return whether a tuned prompt has no settings to compare its privacy statement with."""
    # A transfer passes the statement of its source on, and holds none of the owner's settings.
    is_transferred = "source prompt" in manifest.parents
    return not is_transferred and not isinstance(manifest.config.get("privacy"), dict)


def _tuning_problems(prompt: SoftPromptArtifact) -> list[str]:
    """Describe where a prompt is not what the settings of its tuning give."""
    settings = prompt.manifest.config.get("tune")
    if not isinstance(settings, dict):
        return []
    problems = []
    count = settings.get("num_virtual_tokens")
    is_right = type(count) is int and count == len(prompt.embeddings)
    if count is not None and not is_right:
        problems.append("tune.num_virtual_tokens is not the number of its vectors")
    # Version 0.1.0 tuned nothing but prompts.
    if settings.get("adapter", "prompt") != _ADAPTERS[type(prompt.adapter)]:
        problems.append("tune.adapter is not what was tuned")
    return problems


def admit_student(folder: Path, place: Path, keys: Sequence[str] = ()) -> Path:
    """Copy a student of another party to a place of our own, and check it.

    A student that is there already has been admitted by an earlier command.

    Args:
        folder: the student, which is not trusted.
        place: folder for admitted students, which only we write to.
        keys: trusted public keys, one of which must have signed it; none to take unsigned ones.

    Returns:
        The copy: the manifest, a configuration that was written anew, the weights and the
        tokenizer.

    Raises:
        ArtifactRefused: a check failed.
        InputError: the place cannot be written to.
    """
    make_folder(place, mode=0o700)
    with refusing(folder), quarantined(folder, place, keys=keys) as inside:
        log.info("%s: %s", folder, inside.signature)
        _check_lineage(inside.manifest)
        check_student(inside)
        # Each command checks the sender's signature. The copy, with its rewritten files, would keep
        # one that may be replaced later.
        (inside.folder / SIGNATURE).unlink(missing_ok=True)
        # Two students could be made to share the beginning of their digests.
        admitted = place / inside.manifest.digest
        _keep(inside.folder, admitted)
        return admitted


def _keep(copy: Path, admitted: Path) -> None:
    """Give a checked copy its place, unless an equal one is there.

    A removal that was interrupted has left a part of one.
    """
    sizes = _sizes(copy)
    if admitted.exists() and _sizes(admitted) != sizes:
        shutil.rmtree(admitted)
    if admitted.exists():
        return
    try:
        put_in_place(copy, admitted)
    except OSError:
        # Another process may have admitted the student at the same time.
        if not admitted.exists() or _sizes(admitted) != sizes:
            raise


def _sizes(folder: Path) -> dict[str, int]:
    """Return the size of each file of a flat folder."""
    return {entry.name: entry.lstat().st_size for entry in folder.iterdir()}


@contextmanager
def described_student(folder: Path, keys: Sequence[str] = ()) -> Iterator[Path]:
    """Copy what describes a student of another party, without its weights, and check it.

    Args:
        folder: the student, which is not trusted.
        keys: trusted public keys, one of which must have signed it; none to take unsigned ones.

    Yields:
        The copy: the manifest, the configuration and the tokenizer.

    Raises:
        ArtifactRefused: a check failed.
    """
    with refusing(folder), quarantined(folder, keys=keys, only=_DESCRIPTION) as inside:
        _check_lineage(inside.manifest)
        check_description(inside)
        yield inside.folder


def lineage_problems(manifest: Manifest) -> list[str]:
    """Describe what is wrong with the lineage in a manifest."""
    problems = []
    for name in sorted(_PARENTS[manifest.kind] - set(manifest.parents)):
        problems.append(f"its lineage does not name the {name} that it came from")
    for name, digest in sorted(manifest.parents.items()):
        if not _SHA256.fullmatch(digest):
            problems.append(f"its lineage gives no sha256 for the {printable(name)}")
    return problems


def _check_lineage(manifest: Manifest) -> None:
    # What is made from the artifact passes its lineage on.
    problems = lineage_problems(manifest)
    if problems:
        raise ArtifactRefused("; ".join(problems))


def check_student(inside: Quarantined) -> None:
    """Check the files of a quarantined student, and rewrite its configuration.

    Raises:
        ArtifactRefused: a check failed.
    """
    from post_dist.admission.weights import check_weights
    from post_dist.models.load import load_whole

    check_weights(inside.folder, check_description(inside))
    # Loading finds what the layout does not show, such as a family that ignores a weight.
    model = load_whole(inside.folder, "fp32", torch.device("cpu"))
    for name, weight in model.named_parameters():
        if not bool(weight.isfinite().all()):
            raise ArtifactRefused(f"{name} holds values that are not finite")
    size = sum(parameter.numel() for parameter in model.parameters())
    given_away = inside.manifest.config.get("given_away", {})
    if given_away and not _is_possible(given_away, size):
        raise ArtifactRefused(f"it has {size} parameters, and its manifest says otherwise")
    if not _are_perplexities(inside.manifest.config.get("perplexity", {})):
        raise ArtifactRefused("its manifest has a `perplexity` that does not hold perplexities")


def _check_kind(inside: Quarantined) -> None:
    if inside.manifest.kind != "student":
        raise ArtifactRefused(f"it is a {inside.manifest.kind}, not a student")
    for name in sorted(_DESCRIPTION):
        if not (inside.folder / name).exists():
            raise ArtifactRefused(f"the student lacks {name}")


def check_description(inside: Quarantined) -> "PreTrainedModel":
    """Check what describes a quarantined student, and rewrite its configuration.

    Returns:
        The described model on the meta device.

    Raises:
        ArtifactRefused: a check failed.
    """
    from post_dist.admission.student_config import rebuild_config
    from post_dist.admission.tokenizer_files import (
        check_tokens,
        rebuild_tokenizer_config,
        try_tokenizer,
    )
    from post_dist.admission.weights import meta_student
    from post_dist.models.load import load_tokenizer, tokenizer_fingerprint

    # The cheap checks come first, so that most hostile folders cost no process.
    _check_kind(inside)
    folder = inside.folder
    rebuild_config(folder / "config.json")
    rebuild_tokenizer_config(folder / "tokenizer_config.json")
    described = meta_student(folder)
    vocabulary = len(described.get_input_embeddings().get_parameter("weight"))
    try_tokenizer(folder / "tokenizer.json", vocabulary)
    tokenizer = load_tokenizer(folder)
    check_tokens(tokenizer, vocabulary)
    if tokenizer_fingerprint(tokenizer) != inside.manifest.tokenizer:
        raise ArtifactRefused("the tokenizer is not the one that the manifest names")
    return described


def check_trusted(folder: Path, *, trusted: bool) -> None:
    """Refuse a student without a manifest, unless the user says that it is a model of his own.

    Args:
        folder: the student.
        trusted: `inputs.trust_model` of the run file.

    Raises:
        ArtifactRefused: it cannot be checked, and is not trusted.
    """
    # Nobody can tell a model of one's own from one whose sender has left the manifest out.
    if not trusted:
        raise ArtifactRefused(
            f"{folder} has no {FILE_NAME}, so it cannot be checked",
            "get the student again; for a model of your own, set inputs.trust_model: true",
        )
    log.warning("%s has no %s: it is trusted, and not checked", folder, FILE_NAME)


def _is_possible(given_away: Any, size: int) -> bool:
    """Return whether a statement of what a student gives away is possible for its size."""
    names = {"student_parameters", "unchanged_parameters", "teacher_parameters"}
    if not isinstance(given_away, dict) or set(given_away) != names:
        return False
    if any(type(count) is not int for count in given_away.values()):
        return False
    unchanged = given_away["unchanged_parameters"]
    student = given_away["student_parameters"]
    return bool(student == size and 0 <= unchanged <= student <= given_away["teacher_parameters"])


def _are_perplexities(statement: Any) -> bool:
    """Return whether a statement holds perplexities by the names that `distill` gives them."""
    if not isinstance(statement, dict):
        return False
    return all(
        _PERPLEXITY.fullmatch(name) and type(value) is float and value >= 1
        for name, value in statement.items()
    )
