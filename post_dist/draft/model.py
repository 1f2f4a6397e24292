"""The model that a drafted run file names."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from post_dist.admission.door import described_student
from post_dist.artifacts.manifest import FILE_NAME
from post_dist.errors import InputError
from post_dist.models.facts import ModelFacts, read_facts
from post_dist.models.load import check_has_weights, load_tokenizer
from post_dist.paths import kind_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class DraftModel:
    """The model that the prompt will be tuned on.

    Attributes:
        folder: its folder.
        facts: facts of the model.
        tokenizer: its tokenizer.
    """

    folder: Path
    facts: ModelFacts
    tokenizer: "PreTrainedTokenizerBase"


def read_draft_model(folder: Path) -> DraftModel:
    """Read what a run file says of a model, and check that the model can be used.

    Raises:
        InputError: the folder does not hold a whole model.
        ArtifactRefused: the model comes from another party, and is refused.
    """
    if kind_of(folder) != "folder":
        raise InputError(
            f"--model: {folder} is not a folder",
            "download a hub model first: hf download ORG/NAME --local-dir DIR",
        )
    # A folder without weights would only show when tuning starts.
    check_has_weights(folder)
    # A model with a manifest comes from another party.
    if not (folder / FILE_NAME).exists():
        return DraftModel(folder, read_facts(folder), load_tokenizer(folder))
    with described_student(folder) as inside:
        return DraftModel(folder, read_facts(inside), load_tokenizer(inside))
