"""Check an artifact from the other party: hashes, lineage, shapes, finite values, epsilon."""

import re
from pathlib import Path
from typing import Any

from post_dist.artifacts.manifest import ArtifactKind, Manifest, read_any_manifest
from post_dist.artifacts.prompt import PRIVACY, read_prompt
from post_dist.errors import ArtifactRefused, PostDistError
from post_dist.privacy.statement import statement_problems

_SHA256 = re.compile(r"[0-9a-f]{64}")
_PARENTS = {
    "student": {"teacher"},
    "public prompt": {"teacher", "student"},
    "soft prompt": {"model"},
    "evaluation": {"teacher", "student"},
}
"""For each kind of artifact, the parents that its lineage must name."""


def verify(folder: Path) -> dict[str, Any]:
    """Check an artifact, and list every problem.

    Nothing in the folder is executed or trusted.

    Returns:
        `{"ok", "kind", "problems"}`; `kind` is None if the manifest cannot be used. An accepted
        student also has `given_away`, which is empty in a student of version 0.1.0.
    """
    try:
        manifest = read_any_manifest(folder)
    except ArtifactRefused as error:
        return {"ok": False, "kind": None, "problems": [str(error)]}
    # List all problems: a problem with the contents must not hide one with the lineage.
    problems = _lineage_problems(manifest)
    try:
        if manifest.kind in ("soft prompt", "public prompt"):
            problems += _prompt_problems(folder, manifest.kind)
        elif manifest.kind == "student":
            problems += _weight_problems(folder, manifest.config.get("given_away", {}))
    except PostDistError as error:
        problems.append(str(error))
    result = {"ok": not problems, "kind": manifest.kind, "problems": problems}
    if manifest.kind == "student" and not problems:
        # What the student holds of its teacher, by its provider's own statement.
        result["given_away"] = manifest.config.get("given_away", {})
    return result


def _lineage_problems(manifest: Manifest) -> list[str]:
    problems = []
    for name in sorted(_PARENTS[manifest.kind] - set(manifest.parents)):
        problems.append(f"its lineage does not name the {name} that it came from")
    for name, digest in sorted(manifest.parents.items()):
        if not _SHA256.fullmatch(str(digest)):
            problems.append(f"its lineage gives no sha256 for the {name}")
    return problems


def _prompt_problems(folder: Path, kind: ArtifactKind) -> list[str]:
    """Read a prompt with its checks, and recompute epsilon from its privacy statement."""
    prompt = read_prompt(folder, kind)
    if prompt.privacy is None:
        return []
    return [f"{PRIVACY}: {problem}" for problem in statement_problems(prompt.privacy)]


def _weight_problems(folder: Path, given_away: Any) -> list[str]:
    """Find weights of a student that are not finite or do not fit its configuration.

    Args:
        folder: the student.
        given_away: what its manifest says of the parameters that it shares with the teacher; empty
            in a student of version 0.1.0.
    """
    import torch

    from post_dist.models.load import load_whole

    # Tensor by tensor, so that this scan needs little memory.
    for path in sorted(folder.glob("*.safetensors")):
        problem = _file_problem(path)
        if problem is not None:
            return [problem]
    # Loading finds weights that are missing, unknown, or of another shape than config.json says.
    model = load_whole(folder, "fp32", torch.device("cpu"))
    size = sum(parameter.numel() for parameter in model.parameters())
    if given_away and not _fits(given_away, size):
        return [f"it has {size} parameters, and its manifest says otherwise"]
    return []


def _fits(given_away: Any, size: int) -> bool:
    """Return whether a statement of what a student gives away is possible for its size."""
    names = {"student_parameters", "unchanged_parameters", "teacher_parameters"}
    if not isinstance(given_away, dict) or set(given_away) != names:
        return False
    if any(type(count) is not int for count in given_away.values()):
        return False
    unchanged = given_away["unchanged_parameters"]
    student = given_away["student_parameters"]
    return student == size and 0 <= unchanged <= student <= given_away["teacher_parameters"]


def _file_problem(path: Path) -> str | None:
    """Return what is wrong with one file of weights, or None."""
    import torch
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                if not torch.isfinite(file.get_tensor(name)).all():
                    return f"{path.name}: {name} holds values that are not finite"
    except SafetensorError:
        return f"{path.name} is not a safetensors file"
    return None
