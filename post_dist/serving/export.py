"""Write a prompt in the form that other software takes."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from post_dist.artifacts.card import write_card
from post_dist.artifacts.prompt import (
    Provenance,
    SoftPromptArtifact,
    write_prompt,
    write_prompt_files,
)
from post_dist.errors import InputError, command_line
from post_dist.files import write_folder
from post_dist.models.embedding_table import read_embedding_table
from post_dist.models.facts import meta_model
from post_dist.paths import kind_of
from post_dist.serving.completions import write_completions
from post_dist.serving.model import FittingModel, fitting_model
from post_dist.serving.peft_check import check_peft_reads
from post_dist.serving.prompt import ExportFormat


@dataclass(frozen=True)
class _Export:
    """A prompt, and the model that it is exported for.

    Attributes:
        prompt: the prompt.
        model: the model, without its weights.
        name: folder or hub name of the model, as the user gave it.
    """

    prompt: SoftPromptArtifact
    model: FittingModel
    name: str

    @property
    def is_hub_name(self) -> bool:
        """Whether the model is one of the hub; otherwise it is a folder of this machine."""
        return not kind_of(Path(self.name))

    @property
    def address(self) -> str:
        """Hub name of the model, or the absolute path of its folder."""
        return self.name if self.is_hub_name else str(Path(self.name).resolve())


def export_prompt(
    prompt: SoftPromptArtifact,
    form: ExportFormat,
    model: str,
    revision: str | None,
    destination: Path,
) -> None:
    """Write a prompt in the form that other software takes.

    Args:
        prompt: the prompt.
        form: `vllm`, `peft` or `hub`.
        model: folder or hub name of the model that the prompt was made for.
        revision: commit of a hub model.
        destination: the folder to create.

    Raises:
        ArtifactRefused: the prompt does not belong to the model.
        InputError: the form cannot hold this prompt, or the folder exists.
        EnvironmentFault: the hub cannot be reached, or the disk is full.
    """
    if kind_of(destination):
        raise InputError(f"{destination} exists already", "give another folder with --output")
    adapter = prompt.adapter
    takes = adapter is None or form == "hub" or (form == "peft" and adapter.in_peft)
    if adapter is not None and not takes:
        raise InputError(
            f"the prompt has a {adapter.title} {adapter.place}, which {form} does not run",
            "use `post-dist predict`, or transfer the owner's prompt with transfer.adapter: prompt",
        )
    with fitting_model(prompt, model, revision) as found:
        if form == "vllm" and found.facts.masked:
            raise InputError("vLLM generates text, and a masked model does not")
        _WRITERS[form](_Export(prompt, found, model), destination)


def _write_vllm(export: _Export, destination: Path) -> None:
    """Write what `Completions` reads."""
    table_Vd = read_embedding_table(export.model.folder)

    def fill(folder: Path) -> None:
        write_completions(folder, export.prompt, export.model.tokenizer, table_Vd, export.address)

    write_folder(destination, fill)


def _write_peft(export: _Export, destination: Path) -> None:
    """Write an adapter that names its model, so that PEFT's auto classes load both."""

    def fill(folder: Path) -> None:
        write_prompt_files(folder, export.prompt, export.address)
        check_peft_reads(folder, export.prompt, meta_model(export.model.folder))

    write_folder(destination, fill)


def _write_hub(export: _Export, destination: Path) -> None:
    """Write an artifact with a card for the hub. `verify` and `predict` take it too."""
    prompt = export.prompt
    # The path of a folder would describe this machine.
    name = export.name if export.is_hub_name else Path(export.address).name
    provenance = Provenance(
        model_name=name,
        tokenizer=prompt.manifest.tokenizer,
        parents=prompt.manifest.parents,
        config=prompt.manifest.config,
    )
    write_prompt(destination, prompt, provenance, lambda folder: _write_card(export, name, folder))


def _write_card(export: _Export, name: str, folder: Path) -> None:
    """Write the card of a prompt on the hub: what it is, its privacy, and how to use it."""
    prompt = export.prompt
    command = command_line("post-dist", "predict", "DIR", "TEXTS", "--model", name)
    notes = {"Use": [f"`{command}` answers with this prompt."]}
    settings: dict[str, Any] = {
        "model": name,
        "prompt vectors": len(prompt.embeddings),
        "template": repr(prompt.task.template),
        "classes": ", ".join(prompt.task.class_names),
    }
    privacy = prompt.privacy
    if privacy is None or privacy["epsilon"] is None:
        summary = "It was made WITHOUT differential privacy and may reveal its training data."
        settings["epsilon"] = "none"
    else:
        summary = (
            f"It is differentially private with epsilon {privacy['epsilon']:.4g} at delta "
            f"{privacy['delta']:.2g}, for {privacy['unit']}."
        )
        for field in ("epsilon", "delta", "unit", "neighbouring_relation", "accountant"):
            settings[field] = privacy[field]
        notes["What epsilon does not cover"] = privacy["not_covered"]
    write_card(
        folder,
        f"Soft prompt for {name}",
        f"A soft prompt for {name}. {summary}",
        settings,
        library="peft",
        tag="prompt-tuning",
        notes=notes,
        base_model=name if export.is_hub_name else None,
    )


_WRITERS: dict[ExportFormat, Callable[[_Export, Path], None]] = {
    "vllm": _write_vllm,
    "peft": _write_peft,
    "hub": _write_hub,
}
