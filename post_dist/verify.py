"""Check an artifact from the other party: files, lineage, shapes, finite values, epsilon."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from post_dist.admission.door import check_prompt, check_student, lineage_problems
from post_dist.admission.evaluation import checked_table
from post_dist.admission.quarantine import Quarantined, quarantined
from post_dist.admission.refusal import refusing
from post_dist.artifacts.manifest import FILE_NAME, ArtifactKind
from post_dist.errors import ArtifactRefused


def verify(folder: Path, keys: Sequence[str] = ()) -> dict[str, Any]:
    """Check an artifact, and list every problem (see `verified_manifest`)."""
    result, _ = verified_manifest(folder, keys)
    return result


def verified_manifest(
    folder: Path, keys: Sequence[str] = (), *, signature_counts: bool = True
) -> tuple[dict[str, Any], bytes]:
    """Check an artifact, and list every problem.

    Nothing in the folder is executed or trusted.

    Args:
        folder: the artifact.
        keys: trusted public keys, one of which must have signed it; none to take unsigned ones.
        signature_counts: whether to check its signature. One that is about to be replaced may be
            damaged.

    Returns:
        `{"ok", "kind", "problems", "signature"}`, and the bytes of the manifest that was checked.
        If it cannot be used, `kind` is None, and there are no bytes and no `signature`. An accepted
        student also has `given_away` and `perplexity`, which are empty in a student of version
        0.1.0. An accepted prompt has `epsilon`, `delta` and `unit` of its checked statement,
        because its README.md may say anything; None without a guarantee.
    """
    try:
        inspected = quarantined(folder, keys=keys, signature_counts=signature_counts)
        with refusing(folder), inspected as inside:
            return _verified(folder, inside), (inside.folder / FILE_NAME).read_bytes()
    except ArtifactRefused as error:
        return {"ok": False, "kind": None, "problems": [str(error)]}, b""


def _verified(folder: Path, inside: Quarantined) -> dict[str, Any]:
    manifest = inside.manifest
    # List all problems: a problem with the contents must not hide one with the lineage.
    problems = lineage_problems(manifest)
    stated: dict[str, Any] = {}
    try:
        with refusing(folder):
            stated = _CHECKS[manifest.kind](inside)
    except ArtifactRefused as error:
        problems.append(str(error))
    result = {
        "ok": not problems,
        "kind": manifest.kind,
        "problems": problems,
        "signature": inside.signature,
    }
    return result if problems else result | stated


def _check_student(inside: Quarantined) -> dict[str, Any]:
    """Check a student, and return what it holds of its teacher by its provider's own statement."""
    check_student(inside)
    config = inside.manifest.config
    return {name: config.get(name, {}) for name in ("given_away", "perplexity")}


def _check_prompt(inside: Quarantined) -> dict[str, Any]:
    """Check a prompt, and return its guarantee."""
    prompt = check_prompt(inside, inside.manifest.kind)
    if prompt.privacy is None or prompt.epsilon is None:
        return {"epsilon": None, "delta": None, "unit": None}
    return {name: prompt.privacy[name] for name in ("epsilon", "delta", "unit")}


def _check_evaluation(inside: Quarantined) -> dict[str, Any]:
    checked_table(inside)
    return {}


_CHECKS: Mapping[ArtifactKind, Callable[[Quarantined], dict[str, Any]]] = {
    "student": _check_student,
    "public prompt": _check_prompt,
    "soft prompt": _check_prompt,
    "evaluation": _check_evaluation,
}
"""The check of each kind of artifact. It raises ArtifactRefused, and returns what `verify` adds."""
