"""A soft prompt as PEFT's two files, with its task beside them. What is read is checked before it is parsed.

Shapes: n prompt tokens, d width.
"""

import json
import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from post_dist.artifacts.manifest import Manifest, read_manifest, write_artifact
from post_dist.artifacts.task import PromptTask
from post_dist.errors import ArtifactRefused, EnvironmentFault

KEY = "prompt_embeddings"
MAX_VIRTUAL_TOKENS = 512
_WEIGHTS = "adapter_model.safetensors"
_TASK = "task.json"
PRIVACY = "privacy.json"
_HEADER_LIMIT_BYTES = 1 << 16
_DTYPE_BYTES = {"F32": 4, "BF16": 2, "F16": 2}
_NORM_LIMIT = 1e4
"""Largest Euclidean norm of one prompt vector; embeddings of the known families stay below 100."""


@dataclass(frozen=True)
class SoftPromptArtifact:
    """A prompt that has passed its checks.

    Attributes:
        embeddings: [n, d] in fp32.
        task: what it was tuned for.
        manifest: of its folder.
        privacy: `privacy.json` as it was given, or None: then the prompt was tuned without privacy.
    """

    embeddings: torch.Tensor
    task: PromptTask
    manifest: Manifest
    privacy: dict[str, Any] | None

    @property
    def epsilon(self) -> float | None:
        """The epsilon that it claims at its own delta; None where nothing is claimed."""
        return None if self.privacy is None else self.privacy["epsilon"]


def write_prompt(
    destination: Path,
    embeddings_nd: torch.Tensor,
    task: PromptTask,
    model_name: str,
    privacy: dict[str, Any] | None,
    *,
    card: Callable[[Path], None],
    parents: Mapping[str, str],
    config: Mapping[str, Any],
    tokenizer: str,
) -> None:
    """Write a prompt's folder, atomically, and read it back as its receiver will before it gets its name.

    Raises:
        ArtifactRefused: its values are not finite or far too large.
        EnvironmentFault: what is on the disk is not what was trained.
    """

    def fill(folder: Path) -> None:
        write_prompt_files(folder, embeddings_nd, task, model_name, privacy)
        card(folder)

    def check(folder: Path) -> None:
        read_back = read_prompt(folder)
        if (
            not torch.equal(read_back.embeddings, embeddings_nd.detach().float().cpu())
            or read_back.task != task
        ):
            raise EnvironmentFault(
                f"{folder} does not read back as it was written", "check the disk"
            )

    write_artifact(
        destination,
        "soft prompt",
        fill,
        parents=parents,
        config=config,
        tokenizer=tokenizer,
        check=check,
    )


def write_prompt_files(
    folder: Path,
    embeddings_nd: torch.Tensor,
    task: PromptTask,
    model_name: str,
    privacy: dict[str, Any] | None,
) -> None:
    """Write what `PeftModel.from_pretrained` loads, `task.json`, and `privacy.json` for a private prompt.

    PEFT has no task type for masked models: FEATURE_EXTRACTION puts the prompt before them and leaves their head alone.
    """
    from peft import PromptTuningConfig  # 5 s to import

    save_file(
        {KEY: embeddings_nd.detach().to("cpu", torch.float32).contiguous()},
        folder / _WEIGHTS,
        metadata={"format": "pt"},
    )
    PromptTuningConfig(
        task_type="FEATURE_EXTRACTION" if "{mask}" in task.template else "CAUSAL_LM",
        base_model_name_or_path=model_name,
        num_virtual_tokens=embeddings_nd.shape[0],
        token_dim=embeddings_nd.shape[1],
        inference_mode=True,
    ).save_pretrained(str(folder))
    (folder / _TASK).write_text(json.dumps(asdict(task), indent=2) + "\n")
    if privacy is not None:
        (folder / PRIVACY).write_text(json.dumps(privacy, indent=2) + "\n")


def read_prompt(folder: Path) -> SoftPromptArtifact:
    """Read a prompt folder that may come from anyone.

    Raises:
        ArtifactRefused: wrong kind, hash, size, header, dtype or shape; values not finite or far too large.
    """
    manifest = read_manifest(folder, "soft prompt")
    if not {_WEIGHTS, _TASK, "adapter_config.json"} <= set(manifest.files):
        raise ArtifactRefused(f"{folder} lacks a file of a soft prompt")
    weights = folder / _WEIGHTS
    _check_header(weights)
    embeddings = load_file(weights)[KEY].float()
    if not torch.isfinite(embeddings).all():
        raise ArtifactRefused(f"{weights} holds values that are not finite")
    if embeddings.norm(dim=1).max() > _NORM_LIMIT:
        raise ArtifactRefused(f"{weights} holds a vector with a norm above {_NORM_LIMIT:g}")
    privacy = _read_privacy(folder / PRIVACY) if PRIVACY in manifest.files else None
    return SoftPromptArtifact(embeddings, _read_task(folder / _TASK), manifest, privacy)


def _read_privacy(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _HEADER_LIMIT_BYTES:
            raise ValueError("too large")
        fields = json.loads(path.read_text())
        epsilon = fields["epsilon"]
        if epsilon is not None and not (
            type(epsilon) in (int, float) and 0 <= float(epsilon) < math.inf
        ):
            raise ValueError("epsilon is no number")
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError):
        raise ArtifactRefused(f"{path} is not a privacy statement") from None
    return dict(fields)


def _read_task(path: Path) -> PromptTask:
    try:
        if path.stat().st_size > _HEADER_LIMIT_BYTES:
            raise ValueError("too large")
        fields = json.loads(path.read_text())
        fields["label_words"] = tuple(
            tuple(str(word) for word in words) for words in fields["label_words"]
        )
        fields["class_biases"] = tuple(float(bias) for bias in fields.get("class_biases", ()))
        task = PromptTask(**fields)
        sound = (
            isinstance(task.template, str)
            and isinstance(task.init_text, str)
            and task.init_text.strip() != ""
            and type(task.max_length) is int
            and 0 < task.max_length <= 1 << 20
            and type(task.allow_multi_token) is bool
            and type(task.max_response_length) is int
            and 0 <= task.max_response_length <= 1 << 20
            and (len(task.label_words) >= 2) == (task.max_response_length == 0)
            and len(task.class_biases) in (0, len(task.label_words))
            and all(abs(bias) < _NORM_LIMIT for bias in task.class_biases)
        )
        if not sound:
            raise ValueError("a field has the wrong type")
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError):
        raise ArtifactRefused(f"{path} is not a task description") from None
    return task


def _check_header(path: Path) -> None:
    """Check size, header and shape by hand, before a library allocates anything for them."""

    def refuse(why: str) -> ArtifactRefused:
        return ArtifactRefused(f"{path}: {why}")

    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if len(start) < 8:
            raise refuse("is no safetensors file")
        (header_bytes,) = struct.unpack("<Q", start)
        if header_bytes > min(_HEADER_LIMIT_BYTES, size - 8):
            raise refuse("its header is too large")
        try:
            header: dict[str, Any] = json.loads(
                file.read(header_bytes), object_pairs_hook=_no_duplicates
            )
            header.pop("__metadata__", None)
            entry = header.pop(KEY)
            dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise refuse(f"does not hold one tensor named {KEY}") from None
    if header:
        raise refuse(f"holds more than the one tensor {KEY}")
    if dtype not in _DTYPE_BYTES:
        raise refuse(f"has dtype {str(dtype)[:20]}, not one of {', '.join(_DTYPE_BYTES)}")
    if not (
        isinstance(shape, list)
        and len(shape) == 2
        and all(type(length) is int and length > 0 for length in shape)
    ):
        raise refuse("its shape is not [n, d]")
    if shape[0] > MAX_VIRTUAL_TOKENS:
        raise refuse(f"has {shape[0]} prompt tokens, more than {MAX_VIRTUAL_TOKENS}")
    payload = math.prod(shape) * _DTYPE_BYTES[dtype]
    if offsets != [0, payload] or size != 8 + header_bytes + payload:
        raise refuse("its data do not fit its shape")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError("a key stands twice")
    return dict(pairs)
