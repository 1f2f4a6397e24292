"""The artifact of a transferred prompt, with its card."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from post_dist.artifacts.card import write_card
from post_dist.artifacts.prompt import PromptContents, Provenance, write_prompt
from post_dist.stages.transfer.job import TransferJob


@dataclass(frozen=True)
class NamedTarget:
    """The identity of the target in an artifact: its name and two digests.

    Attributes:
        name: its name, in PEFT's configuration.
        weights: digest of its weights.
        tokenizer: fingerprint of its tokenizer.
    """

    name: str
    weights: str
    tokenizer: str


def write_transferred(job: TransferJob, effect: Mapping[str, Any], target: NamedTarget) -> None:
    """Write the artifact of a trained prompt or LoRA.

    Args:
        job: what was trained.
        effect: its effect on public text.
        target: the model that it is for.
    """
    source = job.source
    section = job.objective.section
    # The class biases were part of the loss, so the new prompt has learned their effect.
    task = replace(source.task, class_biases=())
    # The new prompt depends on private data only through the source prompt. By post-processing, the
    # epsilon of the source prompt holds for it too.
    contents = PromptContents(job.prompt_nd, task, source.privacy, job.lora)
    # The roles of the sender must not replace those that this stage gives.
    own = {"source prompt": source.manifest.digest, "target": target.weights}
    provenance = Provenance(
        model_name=target.name,
        tokenizer=target.tokenizer,
        parents=source.manifest.parents | own,
        config={
            "transfer": section.model_dump(mode="json"),
            "task": asdict(task),
            "public_text": dict(job.objective.statistics),
            "effect_on_public_text": dict(effect),
        },
    )

    def card(artifact: Path) -> None:
        _write_card(artifact, job, effect, target.name)

    write_prompt(job.run.folder.artifact, contents, provenance, card)


def _write_card(
    artifact: Path, job: TransferJob, effect: Mapping[str, Any], target_name: str
) -> None:
    """Write the model card, with the settings and the claim of the source prompt."""
    source = job.source
    claim: dict[str, Any] = {"epsilon": "none: the source prompt is not private"}
    if source.privacy is not None and source.epsilon is not None:
        # Epsilon means nothing without the other three.
        named = ("epsilon", "delta", "unit", "neighbouring_relation")
        claim = {name: source.privacy[name] for name in named}
    title = "Soft prompt" if job.lora is None else "LoRA"
    what = "soft prompt" if job.lora is None else "LoRA behind a soft prompt"
    write_card(
        artifact,
        f"{title} for {target_name}",
        f"A {what} that was transferred from a student with public text alone (POST).",
        job.objective.section.model_dump() | claim | {"effect on public text": effect},
        library="peft",
        tag="prompt-tuning" if job.lora is None else "lora",
    )
