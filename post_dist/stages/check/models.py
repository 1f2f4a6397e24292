"""Read config.json and tokenizer of a model, without its weights, for the check of a run file."""

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from post_dist.models.facts import ModelFacts, read_facts
from post_dist.models.load import load_tokenizer, tokenizer_fingerprint
from post_dist.models.weight_files import weight_files
from post_dist.paths import kind_of
from post_dist.stages.check.report import Findings


@dataclass(frozen=True)
class CheckedModel:
    """What config.json and the tokenizer tell about a model.

    Attributes:
        facts: facts of the model, or None if config.json cannot be used. A student that does not
            exist yet has the facts of its teacher, with fewer layers.
        tokenizer: tokenizer of the model, or None if it cannot be loaded.
    """

    facts: ModelFacts | None
    tokenizer: PreTrainedTokenizerBase | None


def read_model(folder: Path, stage: str, findings: Findings) -> CheckedModel:
    """Read a model folder without its weights.

    Args:
        folder: the model, in Hugging Face format.
        stage: the first stage that needs the model.
        findings: collects the problems.
    """
    # A missing folder is one error, not one for each of its files.
    facts = findings.attempt(stage, lambda: read_facts(folder))
    if kind_of(folder) != "folder":
        return CheckedModel(None, None)
    tokenizer = findings.attempt(stage, lambda: load_tokenizer(folder))
    return CheckedModel(facts, tokenizer)


def find_weights(folder: Path, stage: str, findings: Findings) -> None:
    """Find the files of a model's weights, without reading them.

    A folder without any is no conflict, because they may be downloaded later.
    """
    if kind_of(folder) != "folder":
        return
    if any(folder.glob("*.safetensors")):
        findings.attempt(stage, lambda: weight_files(folder))
    else:
        findings.not_checked.append(f"weights: there are no safetensors in {folder}")


def same_tokenizer(one: CheckedModel, other: CheckedModel) -> bool:
    """Return whether two models have the same tokenizer; a missing one counts as the same."""
    if one.tokenizer is None or other.tokenizer is None or one.tokenizer is other.tokenizer:
        return True
    return tokenizer_fingerprint(one.tokenizer) == tokenizer_fingerprint(other.tokenizer)
