"""Check an artifact that came from someone else: hashes, lineage, shapes, finite values, and the epsilon that it claims."""

import re
from pathlib import Path
from typing import Any

from post_dist.artifacts.manifest import Manifest, read_any_manifest
from post_dist.artifacts.prompt import PRIVACY, read_prompt
from post_dist.errors import ArtifactRefused, PostDistError
from post_dist.privacy.statement import statement_problems

_SHA256 = re.compile(r"[0-9a-f]{64}")
_PARENTS = {"student": {"teacher"}, "soft prompt": {"model"}, "evaluation": {"teacher", "student"}}


def verify(folder: Path) -> dict[str, Any]:
    """What is wrong with an artifact: `{"ok", "kind", "problems"}`. Nothing in the folder is executed or trusted."""
    try:
        manifest = read_any_manifest(folder)
    except ArtifactRefused as error:
        return {"ok": False, "kind": None, "problems": [str(error)]}
    problems = _lineage_problems(manifest)
    try:
        if manifest.kind == "soft prompt":
            prompt = read_prompt(folder)
            if prompt.privacy is not None:
                problems += [
                    f"{PRIVACY}: {problem}" for problem in statement_problems(prompt.privacy)
                ]
        elif manifest.kind == "student":
            problems += _weight_problems(folder)
    except PostDistError as error:
        problems.append(str(error))
    return {"ok": not problems, "kind": manifest.kind, "problems": problems}


def _lineage_problems(manifest: Manifest) -> list[str]:
    missing = sorted(_PARENTS[manifest.kind] - set(manifest.parents))
    odd = sorted(
        name for name, digest in manifest.parents.items() if not _SHA256.fullmatch(str(digest))
    )
    return [f"its lineage does not name the {name} that it came from" for name in missing] + [
        f"its lineage gives no sha256 for the {name}" for name in odd
    ]


def _weight_problems(folder: Path) -> list[str]:
    """Weights of a student that are no numbers, or do not fit its configuration."""
    import torch
    from safetensors import SafetensorError, safe_open

    from post_dist.models.load import load_whole

    try:
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                for name in file.keys():
                    if not torch.isfinite(file.get_tensor(name)).all():
                        return [f"{path.name}: {name} holds values that are not finite"]
    except SafetensorError:
        return [f"{path.name} is no safetensors file"]
    load_whole(folder, "fp32", torch.device("cpu"))
    return []
