"""Check an artifact from the other party: files, lineage, shapes, finite values, epsilon."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from post_dist.admission.door import check_prompt, check_student, lineage_problems
from post_dist.admission.quarantine import Quarantined, quarantined
from post_dist.admission.refusal import refusing
from post_dist.artifacts.manifest import FILE_NAME
from post_dist.artifacts.prompt import SoftPromptArtifact
from post_dist.errors import ArtifactRefused


def verify(folder: Path, keys: Sequence[str] = ()) -> dict[str, Any]:
    """Check an artifact, and list every problem (see `verified_manifest`)."""
    result, _ = verified_manifest(folder, keys)
    return result


def verified_manifest(folder: Path, keys: Sequence[str] = ()) -> tuple[dict[str, Any], bytes]:
    """Check an artifact, and list every problem.

    Nothing in the folder is executed or trusted.

    Args:
        folder: the artifact.
        keys: trusted public keys, one of which must have signed it; none to take unsigned ones.

    Returns:
        `{"ok", "kind", "problems", "signature"}`, and the bytes of the manifest that was checked.
        If it cannot be used, `kind` is None, and there are no bytes and no `signature`. An accepted
        student also has `given_away` and `perplexity`, which are empty in a student of version
        0.1.0. An accepted prompt has `epsilon`, `delta` and `unit` of its checked statement,
        because its README.md may say anything; None without a guarantee.
    """
    try:
        with refusing(folder), quarantined(folder, keys=keys) as inside:
            return _verified(folder, inside), (inside.folder / FILE_NAME).read_bytes()
    except ArtifactRefused as error:
        return {"ok": False, "kind": None, "problems": [str(error)]}, b""


def _verified(folder: Path, inside: Quarantined) -> dict[str, Any]:
    manifest = inside.manifest
    # List all problems: a problem with the contents must not hide one with the lineage.
    problems = lineage_problems(manifest)
    claim: dict[str, Any] = {}
    try:
        with refusing(folder):
            if manifest.kind in ("soft prompt", "public prompt"):
                claim = _claim(check_prompt(inside, manifest.kind))
            elif manifest.kind == "student":
                check_student(inside)
    except ArtifactRefused as error:
        problems.append(str(error))
    result = {
        "ok": not problems,
        "kind": manifest.kind,
        "problems": problems,
        "signature": inside.signature,
    }
    if manifest.kind == "student" and not problems:
        # What the student holds of its teacher, by its provider's own statement.
        for name in ("given_away", "perplexity"):
            result[name] = manifest.config.get(name, {})
    return result if problems else result | claim


def _claim(prompt: SoftPromptArtifact) -> dict[str, Any]:
    """Return the guarantee of an admitted prompt."""
    if prompt.privacy is None or prompt.epsilon is None:
        return {"epsilon": None, "delta": None, "unit": None}
    return {name: prompt.privacy[name] for name in ("epsilon", "delta", "unit")}
