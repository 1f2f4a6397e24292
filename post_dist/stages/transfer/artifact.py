"""The artifact of a transferred prompt, with its card.

Shapes: n prompt tokens, d width.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from post_dist.artifacts.card import write_card
from post_dist.artifacts.head import LinearHead
from post_dist.artifacts.lora import Lora
from post_dist.artifacts.prompt import (
    Adapter,
    PromptContents,
    Provenance,
    SoftPromptArtifact,
    write_prompt,
)
from post_dist.config.stages import PromptTraining
from post_dist.stages.transfer.objective import TransferObjective


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


@dataclass(frozen=True)
class Transferred:
    """A prompt for the target, perhaps with an adapter behind it.

    Attributes:
        source: the prompt that was tuned on the student.
        objective: what the target was to imitate.
        prompt_nd: the prompt [n, d].
        adapter: what was trained behind it; None if it was the prompt itself.
        effect: its effect on public text.
        statistics: statistics of the public text and of the transfer, by name.
    """

    source: SoftPromptArtifact
    objective: TransferObjective
    prompt_nd: torch.Tensor
    adapter: Adapter | None
    effect: Mapping[str, Any]
    statistics: Mapping[str, float]


def write_transferred(artifact: Path, made: Transferred, target: NamedTarget) -> None:
    """Write the artifact of a transferred prompt.

    Args:
        artifact: its folder.
        made: the prompt.
        target: the model that it is for.
    """
    source = made.source
    section = made.objective.section
    # The class biases were part of the loss, so the new prompt has learned their effect.
    task = replace(source.task, class_biases=())
    # The new prompt depends on private data only through the source prompt. By post-processing, the
    # epsilon of the source prompt holds for it too.
    contents = PromptContents(made.prompt_nd, task, source.privacy, made.adapter)
    # The roles of the sender must not replace those that this stage gives.
    own = {"source prompt": source.manifest.digest, "target": target.weights}
    provenance = Provenance(
        model_name=target.name,
        tokenizer=target.tokenizer,
        parents=source.manifest.parents | own,
        config={
            "transfer": section.model_dump(mode="json"),
            "task": asdict(task),
            "public_text": dict(made.statistics),
            "effect_on_public_text": dict(made.effect),
        },
    )

    def card(folder: Path) -> None:
        _write_card(folder, made, target.name)

    write_prompt(artifact, contents, provenance, card)


def _settings(made: Transferred) -> dict[str, Any]:
    """Return the settings that the artifact was made with."""
    section = made.objective.section
    # A head is fitted and not trained. Nothing else has layers to read.
    if isinstance(made.adapter, LinearHead):
        return section.model_dump(exclude=set(PromptTraining.model_fields) | {"prompts_at_once"})
    return section.model_dump(exclude={"head_layers"})


def _write_card(folder: Path, made: Transferred, target_name: str) -> None:
    """Write the model card, with the settings and the claim of the source prompt."""
    source = made.source
    claim: dict[str, Any] = {"epsilon": "none: the source prompt is not private"}
    if source.privacy is not None and source.epsilon is not None:
        # Epsilon means nothing without the other three.
        named = ("epsilon", "delta", "unit", "neighbouring_relation")
        claim = {name: source.privacy[name] for name in named}
    kind = "soft prompt" if made.adapter is None else made.adapter.title
    what = kind if made.adapter is None else f"{kind} behind a soft prompt"
    write_card(
        folder,
        f"{kind[0].upper()}{kind[1:]} for {target_name}",
        f"A {what} that was transferred from a student with public text alone (POST).",
        _settings(made) | claim | {"effect on public text": made.effect},
        library="peft",
        tag="lora" if isinstance(made.adapter, Lora) else "prompt-tuning",
    )
