"""Check that a soft prompt, which may come from another party, belongs to a model."""

from transformers import PreTrainedTokenizerBase

from post_dist.artifacts.prompt import SoftPromptArtifact
from post_dist.errors import ArtifactRefused
from post_dist.models.facts import ModelFacts
from post_dist.models.load import tokenizer_fingerprint


def check_belongs(
    prompt: SoftPromptArtifact,
    model: ModelFacts,
    tokenizer: PreTrainedTokenizerBase,
    whose: str = "the student",
) -> None:
    """Check that a prompt was made for a model with this width and tokenizer.

    Args:
        prompt: the soft prompt.
        model: facts of the model.
        tokenizer: the model's tokenizer.
        whose: name of the model in the message.

    Raises:
        ArtifactRefused: the widths or the tokenizers of prompt and model differ.
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
