"""The artifacts that a table rests on, found in the run folder by the digests in its manifest."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from post_dist.admission.quarantine import Quarantined, quarantined
from post_dist.artifacts.manifest import FILE_NAME, SIZE_LIMIT_BYTES, Manifest, parse_manifest
from post_dist.artifacts.strict_json import SMALL_FILE_BYTES, read_object
from post_dist.config.yaml_files import read_yaml
from post_dist.errors import PostDistError
from post_dist.files import file_digest

_CLAIM = "privacy.json"
_UNCHECKED = "model"
"""Role of a student without a manifest, such as a downloaded model."""
_COMMANDS = {
    _UNCHECKED: "a model without a manifest",
    "student": "distill",
    "public prompt": "warm-start",
    "student + prompt": "tune",
    "transferred": "transfer",
    "published transfer": "transfer, the paper's loss",
    "full prompt tuning": "tune on the large LLM",
}
"""What made an artifact, by its role. The roles of prompts are names of rows."""

_OWNER = ("student + prompt", "full prompt tuning")
_ADAPTERS = {"head": "linear head", "lora": "LoRA", "prefix": "prefix"}
PREFIX_TUNING = "PREFIX_TUNING"
"""PEFT's name of a prefix."""
_DETAIL_LENGTH = 120
_MATCH = "files match their hashes"
_OLDER_MATCH = f"{_MATCH}; nothing covers the settings (older version)"


@dataclass(frozen=True)
class ReportedArtifact:
    """An artifact that the table rests on.

    Attributes:
        role: `student`, or `model` for one without a manifest; `public prompt`, or the name of the
            row that uses it.
        digest: its sha256, as the evaluation recorded it.
        folder: its folder; None if it is not near the run.
        check: result of comparing its files with their hashes.
        intact: whether that comparison succeeded. Otherwise the fields below are empty.
        config: the settings that made it. They never depend on private data.
        privacy: its `privacy.json`; empty if it has none.
        adapter: its `adapter_config.json`; empty if it has none.
        has_head: whether there is a linear head behind the prompt.
        vectors: numbers of the prompt's vectors and of their components, such as `10×576`; of a
            prefix the number of its virtual tokens.
    """

    role: str
    digest: str
    folder: Path | None = None
    check: str = "not in this run folder"
    intact: bool = False
    config: Mapping[str, Any] = field(default_factory=dict)
    privacy: Mapping[str, Any] = field(default_factory=dict)
    adapter: Mapping[str, Any] = field(default_factory=dict)
    has_head: bool = False
    vectors: str = ""

    @property
    def by_owner(self) -> bool:
        """Whether the data owner made it, and not the provider."""
        return self.role.startswith(_OWNER)

    @property
    def title(self) -> str:
        """The command that made it, such as `transfer, epsilon 4`."""
        for role, command in _COMMANDS.items():
            if self.role.startswith(role) and not self.role.startswith(f"{role} +"):
                return command + self.role.removeprefix(role)
        return self.role

    @property
    def detail(self) -> str:
        """Its main settings, in a few words."""
        parts = []
        layers = self.config.get("layers")
        if isinstance(layers, list):
            parts.append(f"{len(layers)} of {self.config.get('num_teacher_layers')} layers")
        for stage in ("warm_start", "tune", "transfer", "distill"):
            settings = self.config.get(stage)
            if isinstance(settings, dict):
                # Private tuning takes the steps of its plan, and ignores those of `tune`.
                planned = self.privacy.get("steps") if stage == "tune" else None
                parts += _stage_details(settings, planned or steps_of(stage, settings))
        if "epsilon" in self.privacy:
            parts.append(f"ε = {number(self.privacy['epsilon'])}")
        return ", ".join(parts)[:_DETAIL_LENGTH]


def number(value: object) -> str:
    """Return an epsilon with two decimals, or `none`. A file may hold anything instead."""
    return f"{value:.2f}" if isinstance(value, int | float) else "none"


def steps_of(stage: str, settings: Mapping[str, Any]) -> object:
    """Return the number of steps in a stage's settings; None if the stage has none."""
    # A head on the large LLM is fitted, and not trained.
    is_fitted = stage == "transfer" and settings.get("adapter") == "head"
    return None if is_fitted else settings.get("steps")


def settings_of(folder: Path) -> dict[str, Any]:
    """Read the settings in a stage's folder; empty if they cannot be read."""
    path = folder / "resolved.yaml"
    try:
        # The parser takes a second for each 100 KB.
        is_small = _is_small_file(path, SMALL_FILE_BYTES)
        settings = read_yaml(path.read_text(), path.name) if is_small else None
    except (OSError, ValueError, PostDistError):
        return {}
    return settings if isinstance(settings, dict) else {}


def lineage(evaluation: Path) -> list[ReportedArtifact]:
    """Find the student and the prompts of an evaluation.

    Only artifacts whose digest the evaluation has recorded are listed. The run folder may hold
    others, with other settings.

    Args:
        evaluation: the folder of the finished evaluation.
    """
    table = manifest_of(evaluation / "artifact")
    if table is None:
        return []
    near = _artifacts_near(evaluation)
    unchecked = _unchecked_models(table, near)
    found: dict[str, ReportedArtifact] = {}
    for role, digest in table.parents.items():
        # The teacher is a model without a manifest. Two rows may use one prompt.
        if role == "teacher" or digest in found:
            continue
        if digest in unchecked:
            found[digest] = ReportedArtifact(_UNCHECKED, digest, check="trusted, not checked")
            continue
        found[digest] = _reported(role, digest, near)
        parents = near[digest][1].parents if digest in near else {}
        public = parents.get("public prompt")
        if public is not None and public not in found:
            found[public] = _reported("public prompt", public, near)
    return sorted(found.values(), key=_place)


def _unchecked_models(table: Manifest, near: Mapping[str, tuple[Path, Manifest]]) -> set[str]:
    """Return the digests of models without a manifest that the prompts of a table are tuned on."""
    found = set()
    for digest in table.parents.values():
        manifest = near[digest][1] if digest in near else None
        if manifest is not None and manifest.config.get("student_checked") is False:
            found.add(manifest.parents.get("model", ""))
    return found


def _place(made: ReportedArtifact) -> int:
    """Return the place of an artifact in the order in which they are made."""
    roles = list(_COMMANDS)
    for place, role in reversed(list(enumerate(roles))):
        if made.role.startswith(role):
            return place
    return len(roles)


def _artifacts_near(evaluation: Path) -> dict[str, tuple[Path, Manifest]]:
    """Return the artifacts of the run, and those that its run file names, by their digest."""
    folders = [path.parent for path in evaluation.parent.glob(f"*/artifact/{FILE_NAME}")]
    inputs = settings_of(evaluation).get("inputs")
    for given in inputs.values() if isinstance(inputs, dict) else []:
        if isinstance(given, str):
            folders.append(Path(given))
    near = {}
    for folder in folders:
        manifest = manifest_of(folder)
        if manifest is not None:
            near[manifest.digest] = (folder, manifest)
    return near


def manifest_of(folder: Path) -> Manifest | None:
    """Read a manifest, or return None if it cannot be read."""
    path = folder / FILE_NAME
    try:
        return parse_manifest(path) if _is_small_file(path) else None
    except (OSError, PostDistError):
        return None


def _is_small_file(path: Path, most_bytes: int = SIZE_LIMIT_BYTES) -> bool:
    """Return whether a path may be read whole. A pipe would make the reader wait for ever."""
    return path.is_file() and path.stat().st_size <= most_bytes


def _reported(
    role: str, digest: str, near: Mapping[str, tuple[Path, Manifest]]
) -> ReportedArtifact:
    """Describe one artifact, and compare its files with their hashes."""
    if digest not in near:
        return ReportedArtifact(role, digest)
    folder, manifest = near[digest]
    try:
        # The weights of a student are many, and the page shows none of them.
        with quarantined(folder, hashed_only=manifest.kind == "student") as inside:
            if inside.manifest.digest == digest:
                return _described(role, folder, inside)
    except (OSError, PostDistError):
        pass
    # Nothing that it says is shown. The evaluation has checked other files.
    return ReportedArtifact(role, digest, folder, "files were changed")


def _described(role: str, folder: Path, inside: Quarantined) -> ReportedArtifact:
    """Read what the page says of an artifact from its private copy."""
    copy = inside.folder
    adapter = _object(copy / "adapter_config.json")
    return ReportedArtifact(
        role,
        inside.manifest.digest,
        folder,
        check=_MATCH if inside.manifest.digest_covers_settings else _OLDER_MATCH,
        intact=True,
        config=inside.manifest.config,
        privacy=privacy_claim(copy),
        adapter=adapter,
        has_head="head.safetensors" in inside.manifest.files,
        vectors=_vectors(copy, adapter),
    )


def _vectors(copy: Path, adapter: Mapping[str, Any]) -> str:
    """Return the numbers of a prompt's vectors and of their components, such as `10×576`."""
    if adapter.get("peft_type") == PREFIX_TUNING:
        return str(adapter.get("num_virtual_tokens"))
    # The prompt in front of a LoRA has a file of its own.
    own = copy / "prompt.safetensors"
    if own.exists():
        from post_dist.artifacts.prompt_reader import read_embeddings  # loads torch

        count, width = read_embeddings(own).shape
        return f"{count}×{width}"
    return f"{adapter.get('num_virtual_tokens')}×{adapter.get('token_dim')}"


def privacy_claim(folder: Path) -> dict[str, Any]:
    """Read the privacy claim of a prompt; empty if there is none."""
    return _object(folder / _CLAIM)


def listed_claim(folder: Path) -> dict[str, Any]:
    """Read the privacy claim that the manifest of a folder lists; empty if there is none."""
    manifest = manifest_of(folder)
    digest = None if manifest is None else manifest.files.get(_CLAIM)
    path = folder / _CLAIM
    try:
        is_listed = _is_small_file(path) and file_digest(path) == digest
    except OSError:
        return {}
    return privacy_claim(folder) if is_listed else {}


def _object(path: Path) -> dict[str, Any]:
    """Read a small JSON object; empty if it cannot be read."""
    try:
        return read_object(path) if _is_small_file(path) else {}
    except (OSError, PostDistError):
        return {}


def _stage_details(settings: Mapping[str, Any], steps: object) -> list[str]:
    """Return the main settings of one stage, and its number of steps if there is one."""
    parts = []
    if "objective" in settings:
        parts.append(f"objective {settings['objective']}")
    adapter = settings.get("adapter")
    if isinstance(adapter, str) and adapter in _ADAPTERS:
        parts.append(_ADAPTERS[adapter])
    if "num_virtual_tokens" in settings:
        parts.append(f"{settings['num_virtual_tokens']} prompt vectors")
    if steps is not None:
        parts.append(f"{steps} steps")
    return parts
