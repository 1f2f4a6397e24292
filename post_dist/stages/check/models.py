"""A model as far as its config.json and its tokenizer tell, for the check of a run file."""

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from post_dist.models.facts import ModelFacts, read_facts
from post_dist.models.load import load_tokenizer, tokenizer_fingerprint
from post_dist.stages.check.report import Findings


@dataclass(frozen=True)
class CheckedModel:
    """A model as far as config.json and tokenizer tell.

    Attributes:
        facts: its facts, or None where config.json is wrong. A student that is still to be cut has
            those of its teacher, with fewer layers.
        tokenizer: its tokenizer, or None where that is missing.
    """

    facts: ModelFacts | None
    tokenizer: PreTrainedTokenizerBase | None


def read_model(folder: Path, stage: str, findings: Findings) -> CheckedModel:
    """Read a model folder without its weights.

    Args:
        folder: the model, in Hugging Face format.
        stage: the first stage that needs it.
        findings: collects what is wrong with it.
    """
    # A folder that is not there has one error, not one for each of its files.
    facts = findings.attempt(stage, lambda: read_facts(folder))
    if not folder.is_dir():
        return CheckedModel(None, None)
    tokenizer = findings.attempt(stage, lambda: load_tokenizer(folder))
    # Weights may still be on their way, so their absence is no conflict.
    if not any(folder.glob("*.safetensors")):
        findings.not_checked.append(f"weights: there are no safetensors in {folder}")
    return CheckedModel(facts, tokenizer)


def same_tokenizer(one: CheckedModel, other: CheckedModel) -> bool:
    """Whether two models read the same vocabulary; unknown tokenizers are taken to be the same."""
    if one.tokenizer is None or other.tokenizer is None or one.tokenizer is other.tokenizer:
        return True
    return tokenizer_fingerprint(one.tokenizer) == tokenizer_fingerprint(other.tokenizer)
