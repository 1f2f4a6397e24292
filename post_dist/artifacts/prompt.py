"""Read and write a soft prompt as an artifact: PEFT's files, head, task and privacy statement.

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
from post_dist.artifacts.manifest import ArtifactKind, Manifest, read_manifest, write_artifact
from post_dist.artifacts.prompt_reader import (
    KEY,
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


@dataclass(frozen=True)
class PromptContents:
    """A soft prompt with its task and its privacy statement.

    Attributes:
        embeddings: the vectors [n, d] of the prompt.
        task: the task that the prompt was tuned for.
        privacy: contents of `privacy.json`; None for a prompt that was tuned without privacy.
        head: a linear head behind the prompt, if there is one.
    """

    embeddings: torch.Tensor
    task: PromptTask
    privacy: dict[str, Any] | None
    head: LinearHead | None = None

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
        config: the settings that made the prompt; never anything computed from private data.
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
        if not same or not _same_head(found.head, contents.head):
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


def _same_head(one: LinearHead | None, other: LinearHead | None) -> bool:
    """Return whether two heads hold equal values, or both are missing."""
    if one is None or other is None:
        return one is other
    return all(torch.equal(value, vars(other)[name].cpu()) for name, value in vars(one).items())


def write_prompt_files(folder: Path, contents: PromptContents, model_name: str) -> None:
    """Write the files that `PeftModel.from_pretrained` loads, and what PEFT does not know.

    That is `task.json`, `privacy.json` for a prompt with a privacy statement, and
    `head.safetensors` for one with a head.

    Args:
        folder: an existing folder.
        contents: the prompt.
        model_name: name of the model that the prompt is for, in PEFT's configuration.
    """
    from peft import PromptTuningConfig  # takes 5 s to import

    embeddings_nd = contents.embeddings.detach().to("cpu", torch.float32).contiguous()
    save_file({KEY: embeddings_nd}, folder / _WEIGHTS, metadata={"format": "pt"})
    if contents.head is not None:
        tensors = {name: value.cpu().contiguous() for name, value in vars(contents.head).items()}
        save_file(tensors, folder / _HEAD, metadata={"format": "pt"})

    # PEFT has no task type for masked models. FEATURE_EXTRACTION puts the prompt in front of the
    # text and leaves the head alone.
    is_masked = "{mask}" in contents.task.template
    num_virtual_tokens, width = embeddings_nd.shape
    adapter_config = PromptTuningConfig(
        task_type="FEATURE_EXTRACTION" if is_masked else "CAUSAL_LM",
        base_model_name_or_path=model_name,
        num_virtual_tokens=num_virtual_tokens,
        token_dim=width,
        inference_mode=True,
    )
    adapter_config.save_pretrained(str(folder))

    (folder / _TASK).write_text(json.dumps(asdict(contents.task), indent=2) + "\n")
    if contents.privacy is not None:
        (folder / PRIVACY).write_text(json.dumps(contents.privacy, indent=2) + "\n")


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
    embeddings_nd = read_embeddings(folder / _WEIGHTS)
    check_adapter_config(folder / _ADAPTER_CONFIG, embeddings_nd)
    # A prompt that was tuned without privacy has no statement.
    privacy = None
    if PRIVACY in manifest.files:
        privacy = read_privacy(folder / PRIVACY)
    task = read_task(folder / _TASK)
    head = None
    if _HEAD in manifest.files:
        head = read_head(folder / _HEAD, embeddings_nd.shape[1], len(task.label_words))
    return SoftPromptArtifact(embeddings_nd, task, privacy, head, manifest=manifest)
