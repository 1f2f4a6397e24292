"""Check that a soft prompt, which may come from another party, belongs to a model."""

from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from post_dist.artifacts.head import LinearHead
from post_dist.artifacts.lora import Lora
from post_dist.artifacts.prefix import Prefix
from post_dist.artifacts.prompt import PUBLIC_PROMPT, SoftPromptArtifact
from post_dist.errors import ArtifactRefused
from post_dist.files import digest_of, file_digests, fingerprint
from post_dist.models.facts import ModelFacts
from post_dist.models.load import tokenizer_fingerprint
from post_dist.models.prefix_layers import prefix_shape

_MOST_EMBEDDINGS = 1000
"""Largest norm of a prompt's vector, in norms of the largest embedding.

The prompts of the demo have 0.5. Adam moves each value by its learning rate at most, so in 1,000
steps of 0.1 a vector of width 576 moves by 2,400, which is 320 times the demo's largest embedding.
"""


def check_belongs(
    prompt: SoftPromptArtifact,
    model: ModelFacts,
    tokenizer: PreTrainedTokenizerBase,
    whose: str = "the student",
) -> None:
    """Check that a prompt was made for a model with this width, tokenizer and layers.

    Args:
        prompt: the soft prompt.
        model: facts of the model.
        tokenizer: the model's tokenizer.
        whose: name of the model in the message.

    Raises:
        ArtifactRefused: the widths or the tokenizers of prompt and model differ, or the model lacks
            a layer of its head or LoRA, or keeps other keys and values than its prefix.
    """
    width = prompt.embeddings.shape[1]
    if model.width != width:
        raise ArtifactRefused(
            f"the prompt has vectors of width {width}, {whose} of width {model.width}"
        )
    if tokenizer_fingerprint(tokenizer) != prompt.manifest.tokenizer:
        raise ArtifactRefused(
            f"the tokenizer of {whose} is not the one that the prompt was tuned with"
        )
    if isinstance(prompt.adapter, LinearHead):
        head = prompt.adapter
        needed = head.depth(width) + head.above
        if needed > model.layers:
            raise ArtifactRefused(f"the head needs {needed} layers, but {whose} has {model.layers}")
    if isinstance(prompt.adapter, Lora):
        linears = {name: shape for layer in model.linears for name, shape in layer.items()}
        misfit = prompt.adapter.misfit(linears)
        if misfit is not None:
            raise ArtifactRefused(f"the LoRA changes {misfit}, which does not fit {whose}")
    if isinstance(prompt.adapter, Prefix) and prompt.adapter.shape != prefix_shape(model):
        raise ArtifactRefused(
            f"the prefix holds {prompt.adapter.shape.text}, which does not fit {whose}"
        )


def check_made_for(
    prompt: SoftPromptArtifact,
    whose: str,
    is_model: Callable[[str], bool],
    weights: Callable[[], str],
) -> None:
    """Check that a prompt was made for a model, by the prompt's own lineage.

    A student has the width and the tokenizer of its teacher, so only the lineage tells them apart.

    Args:
        prompt: a public prompt, a tuned prompt, or a transferred one.
        whose: name of the model in the message.
        is_model: whether a digest is that of the model.
        weights: returns the `weights_digest` of the model. Only transferred prompts need it,
            because hashing a large LLM takes minutes.

    Raises:
        ArtifactRefused: it was made for another model.
    """
    parents = prompt.manifest.parents
    made_on = parents["student" if prompt.manifest.kind == PUBLIC_PROMPT else "model"]
    if not is_transferred(prompt):
        if not is_model(made_on):
            raise ArtifactRefused(
                f"the prompt was tuned on another model than {whose}",
                "give the model that it was tuned on; `transfer` makes a prompt for the large LLM",
            )
        return

    # The prompt is for a large LLM. An older one does not name its LLM.
    target = parents.get("target")
    if target is not None and target == weights():
        return
    if is_model(made_on):
        raise ArtifactRefused(
            f"the prompt was transferred from {whose} to a large LLM",
            "give the large LLM, or the prompt that was tuned on this student",
        )
    if target is not None:
        raise ArtifactRefused(
            "the prompt was transferred to an LLM with other weights",
            "give the LLM that it was transferred to; its name is in adapter_config.json",
        )


def is_transferred(prompt: SoftPromptArtifact) -> bool:
    """Return whether a prompt is for a large LLM, by its own lineage."""
    return "source prompt" in prompt.manifest.parents


def is_digest_of(folder: Path, digest: str) -> bool:
    """Return whether a digest is that of a model folder without a manifest."""
    # Version 0.1.0 counted hidden files. The hub's client writes them anew at each download.
    return digest == fingerprint(folder) or digest == digest_of(file_digests(folder))


def check_norms(prompt: SoftPromptArtifact, largest_embedding: float) -> None:
    """Check that a prompt's vectors are not far larger than the embeddings of its model.

    Args:
        prompt: the soft prompt.
        largest_embedding: largest Euclidean norm of the model's input embeddings.

    Raises:
        ArtifactRefused: a vector is. It could make the model overflow, or say the same of any text.
    """
    # One such vector is enough, so it is not averaged away.
    largest = float(prompt.embeddings.norm(dim=1).max())
    if largest > _MOST_EMBEDDINGS * largest_embedding:
        raise ArtifactRefused(
            f"it has a vector of norm {largest:.3g}, and the largest embedding of the model has "
            f"{largest_embedding:.3g}"
        )
