"""Check that a soft prompt, which may come from another party, belongs to a student."""

from transformers import PreTrainedTokenizerBase

from post_dist.artifacts.prompt import SoftPromptArtifact
from post_dist.errors import ArtifactRefused
from post_dist.models.facts import ModelFacts
from post_dist.models.load import tokenizer_fingerprint


def check_belongs(
    prompt: SoftPromptArtifact, student: ModelFacts, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Check that a prompt was tuned on a model with the student's width and tokenizer.

    Args:
        prompt: the soft prompt.
        student: facts of the student.
        tokenizer: the student's tokenizer.

    Raises:
        ArtifactRefused: the widths or the tokenizers of prompt and student differ.
    """
    width = prompt.embeddings.shape[1]
    if student.width != width:
        raise ArtifactRefused(
            f"the prompt has vectors of width {width}, the student of width {student.width}"
        )
    if tokenizer_fingerprint(tokenizer) != prompt.manifest.tokenizer:
        raise ArtifactRefused(
            "the student's tokenizer is not the one that the prompt was tuned with"
        )
