"""Read and write a soft prompt as an artifact: PEFT's files, adapter, task and privacy statement.

Shapes: n prompt tokens, d width.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from post_dist.artifacts.head import LinearHead
from post_dist.artifacts.lora import Lora
from post_dist.artifacts.lora_files import read_lora, write_lora
from post_dist.artifacts.manifest import ArtifactKind, Manifest, read_manifest, write_artifact
from post_dist.artifacts.peft_format import PROMPT_EMBEDDINGS
from post_dist.artifacts.prefix import Prefix
from post_dist.artifacts.prefix_files import holds_prefix, read_prefix, write_prefix
from post_dist.artifacts.prompt_reader import (
    check_adapter_config,
    read_embeddings,
    read_head,
    read_privacy,
    read_task,
)
from post_dist.artifacts.task import PromptTask
from post_dist.errors import ArtifactRefused, EnvironmentFault

PRIVACY = "privacy.json"
PUBLIC_PROMPT: ArtifactKind = "public prompt"
"""Kind of a prompt that no private data has touched. Only such a prompt may start a tuning."""
_WEIGHTS = "adapter_model.safetensors"
_ADAPTER_CONFIG = "adapter_config.json"
_TASK = "task.json"
_HEAD = "head.safetensors"
_PROMPT = "prompt.safetensors"
"""The prompt in front of a LoRA, or that a prefix started from. PEFT's file holds the adapter."""

Adapter = LinearHead | Lora | Prefix
"""What may be tuned behind a fixed prompt, or in its place."""


@dataclass(frozen=True)
class PromptContents:
    """A soft prompt with its task and its privacy statement.

    Attributes:
        embeddings: the vectors [n, d] of the prompt.
        task: the task that the prompt was tuned for.
        privacy: contents of `privacy.json`; None for a prompt that was tuned without privacy.
        adapter: what was tuned behind the prompt or in its place; None if it was the prompt itself.
    """

    embeddings: torch.Tensor
    task: PromptTask
    privacy: dict[str, Any] | None
    adapter: Adapter | None = None

    @property
    def epsilon(self) -> float | None:
        """The epsilon of the privacy statement, at its delta; None without a privacy guarantee."""
        return None if self.privacy is None else self.privacy["epsilon"]


@dataclass(frozen=True)
class SoftPromptArtifact(PromptContents):
    """A prompt that was read from a folder and has passed all checks. Embeddings are in fp32.

    Attributes:
        manifest: the manifest of the folder.
    """

    manifest: Manifest = field(kw_only=True)


@dataclass(frozen=True)
class Provenance:
    """The origin of a soft prompt.

    Attributes:
        model_name: name of the model that the prompt is for, in PEFT's configuration.
        tokenizer: fingerprint of that model's tokenizer.
        parents: sha256 of each input by its role.
        config: the settings that made the prompt. No run computes any of them from private data.
    """

    model_name: str
    tokenizer: str
    parents: Mapping[str, str]
    config: Mapping[str, Any]


def write_prompt(
    destination: Path,
    contents: PromptContents,
    provenance: Provenance,
    write_card: Callable[[Path], None],
    kind: ArtifactKind = "soft prompt",
) -> None:
    """Write the folder of a prompt atomically, and read it back as its receiver will.

    Args:
        destination: the folder to create.
        contents: the prompt.
        provenance: the origin of the prompt.
        write_card: writes the model card into a folder.
        kind: kind of the artifact.

    Raises:
        InputError: the folder cannot be written to.
        ArtifactRefused: values are not finite, or far too large.
        EnvironmentFault: the files read back differ from what was written, or the disk is full.
    """

    def fill(folder: Path) -> None:
        write_prompt_files(folder, contents, provenance.model_name)
        write_card(folder)

    def check(folder: Path) -> None:
        found = read_prompt(folder, kind)
        # The prompt that is read must equal the trained one bit for bit.
        expected = contents.embeddings.detach().float().cpu()
        same = torch.equal(found.embeddings, expected) and found.task == contents.task
        if not same or not _same_adapter(found.adapter, contents.adapter):
            raise EnvironmentFault(
                f"{folder} does not read back as it was written", "check the disk"
            )

    write_artifact(
        destination,
        kind,
        fill,
        parents=provenance.parents,
        config=provenance.config,
        tokenizer=provenance.tokenizer,
        check=check,
    )


def _same_adapter(one: Adapter | None, other: Adapter | None) -> bool:
    """Return whether two adapters hold equal values, or both are missing."""
    if one is None or other is None:
        return one is other
    values = one.tensors
    expected = other.tensors
    same_names = type(one) is type(other) and set(values) == set(expected)
    return same_names and all(
        torch.equal(value, expected[name].detach().cpu()) for name, value in values.items()
    )


def write_prompt_files(folder: Path, contents: PromptContents, model_name: str) -> None:
    """Write the files that `PeftModel.from_pretrained` loads, and what PEFT does not know.

    That is `task.json`, `privacy.json` for a prompt with a privacy statement, and
    `head.safetensors` for one with a head. PEFT loads a LoRA without the prompt in front of it,
    which is in `prompt.safetensors`. A prefix needs no prompt. The one that it started from is kept
    in that file too.

    Args:
        folder: an existing folder.
        contents: the prompt.
        model_name: name of the model that the prompt is for, in PEFT's configuration.
    """
    # PEFT has no task type for masked models. FEATURE_EXTRACTION puts the prompt in front of the
    # text and leaves the head alone.
    is_masked = "{mask}" in contents.task.template
    about = {
        "task_type": "FEATURE_EXTRACTION" if is_masked else "CAUSAL_LM",
        "base_model_name_or_path": model_name,
    }
    embeddings_nd = contents.embeddings.detach().to("cpu", torch.float32).contiguous()
    # PEFT has one file for weights. It holds the LoRA or the prefix, if there is one.
    adapter = contents.adapter
    if isinstance(adapter, Lora | Prefix):
        save_file({PROMPT_EMBEDDINGS: embeddings_nd}, folder / _PROMPT, metadata={"format": "pt"})
        files = (folder / _WEIGHTS, folder / _ADAPTER_CONFIG)
        if isinstance(adapter, Lora):
            write_lora(*files, adapter, about)
        else:
            write_prefix(*files, adapter, about)
    else:
        save_file({PROMPT_EMBEDDINGS: embeddings_nd}, folder / _WEIGHTS, metadata={"format": "pt"})
        _write_prompt_config(folder, embeddings_nd, about)
    if isinstance(adapter, LinearHead):
        tensors = {name: value.cpu().contiguous() for name, value in adapter.tensors.items()}
        save_file(tensors, folder / _HEAD, metadata={"format": "pt"})

    (folder / _TASK).write_text(json.dumps(asdict(contents.task), indent=2) + "\n")
    if contents.privacy is not None:
        (folder / PRIVACY).write_text(json.dumps(contents.privacy, indent=2) + "\n")


def _write_prompt_config(
    folder: Path, embeddings_nd: torch.Tensor, about: Mapping[str, str]
) -> None:
    """Write PEFT's configuration of a prompt."""
    from peft import PromptTuningConfig  # takes 5 s to import

    num_virtual_tokens, width = embeddings_nd.shape
    adapter_config = PromptTuningConfig(
        task_type=about["task_type"],
        base_model_name_or_path=about["base_model_name_or_path"],
        num_virtual_tokens=num_virtual_tokens,
        token_dim=width,
        inference_mode=True,
    )
    adapter_config.save_pretrained(str(folder))


def read_prompt(folder: Path, kind: ArtifactKind = "soft prompt") -> SoftPromptArtifact:
    """Read the folder of a prompt, which is not trusted.

    Args:
        folder: the folder.
        kind: the kind of artifact that it must be.

    Raises:
        ArtifactRefused: wrong kind, hash, size, header, dtype or shape; values that are not finite
            or far too large; a task or privacy statement that cannot be read.
    """
    # Check the hashes first. They show whether these are the files that were written.
    return read_prompt_files(folder, read_manifest(folder, kind))


def read_prompt_files(folder: Path, manifest: Manifest) -> SoftPromptArtifact:
    """Read the files of a prompt, whose hashes have been compared with its manifest.

    Raises:
        ArtifactRefused: as in `read_prompt`.
    """
    if not {_WEIGHTS, _TASK, _ADAPTER_CONFIG} <= set(manifest.files):
        raise ArtifactRefused(f"{folder} lacks a file of a soft prompt")
    # A prompt that was tuned without privacy has no statement.
    privacy = None
    if PRIVACY in manifest.files:
        privacy = read_privacy(folder / PRIVACY)
    task = read_task(folder / _TASK)
    # The prompt is PEFT's file, unless there is a LoRA or a prefix.
    if _PROMPT in manifest.files:
        embeddings_nd = read_embeddings(folder / _PROMPT)
    else:
        embeddings_nd = read_embeddings(folder / _WEIGHTS)
        check_adapter_config(folder / _ADAPTER_CONFIG, embeddings_nd)
    adapter = _read_adapter(folder, manifest, embeddings_nd, task)
    return SoftPromptArtifact(embeddings_nd, task, privacy, adapter, manifest=manifest)


def _read_adapter(
    folder: Path, manifest: Manifest, embeddings_nd: torch.Tensor, task: PromptTask
) -> Adapter | None:
    """Read what was tuned behind a prompt or in its place; None if it was the prompt itself.

    Args:
        folder: the folder.
        manifest: its manifest.
        embeddings_nd: the prompt.
        task: its task.

    Raises:
        ArtifactRefused: as in `read_prompt`.
    """
    has_head = _HEAD in manifest.files
    if _PROMPT not in manifest.files:
        if not has_head:
            return None
        return read_head(folder / _HEAD, embeddings_nd.shape[1], len(task.label_words))
    if has_head:
        raise ArtifactRefused(f"{folder} has a head and a LoRA or a prefix; it has one of them")
    if holds_prefix(folder / _ADAPTER_CONFIG):
        return read_prefix(folder / _WEIGHTS, folder / _ADAPTER_CONFIG, len(embeddings_nd))
    return read_lora(folder / _WEIGHTS, folder / _ADAPTER_CONFIG)
