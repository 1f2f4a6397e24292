"""Find the model of a prompt, and check that they belong together before weights are loaded."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pydantic import ValidationError
from transformers import PreTrainedTokenizerBase

from post_dist.admission.door import admit_student
from post_dist.admission.private_folder import private_folder
from post_dist.artifacts.manifest import FILE_NAME, parse_manifest
from post_dist.artifacts.prompt import SoftPromptArtifact
from post_dist.config.models import Teacher
from post_dist.data.task_reader import TaskReader
from post_dist.errors import ArtifactRefused, InputError
from post_dist.models.embedding_table import largest_embedding_norm
from post_dist.models.facts import ModelFacts, read_facts
from post_dist.models.generation import generation_conflicts
from post_dist.models.load import check_is_model, load_tokenizer, model_folder, weights_of
from post_dist.paths import kind_of
from post_dist.stages.context_length import context_conflicts
from post_dist.stages.prompt_origin import (
    check_belongs,
    check_made_for,
    check_norms,
    is_digest_of,
)

_MODEL = "the model"


@dataclass(frozen=True)
class FittingModel:
    """A model that a prompt belongs to, without its weights.

    Attributes:
        folder: its files, which have been checked. A student's are a private copy, which is deleted
            after use.
        facts: facts of the model.
        tokenizer: its tokenizer.
        reader: the prompt's task, bound to the tokenizer.
    """

    folder: Path
    facts: ModelFacts
    tokenizer: PreTrainedTokenizerBase
    reader: TaskReader


@contextmanager
def fitting_model(
    prompt: SoftPromptArtifact, model: str, revision: str | None
) -> Iterator[FittingModel]:
    """Find a model, and check that a prompt belongs to it.

    Args:
        prompt: the prompt.
        model: folder or hub name of the model.
        revision: commit of a hub model.

    Yields:
        The model.

    Raises:
        ArtifactRefused: the prompt belongs to another model, or the model is a student that does
            not pass its checks.
        InputError: the model cannot be found.
        EnvironmentFault: the hub cannot be reached.
    """
    try:
        section = Teacher(path=model, revision=revision)
    except ValidationError:
        raise InputError(
            f"{model} is not a folder",
            "give the folder of a model, or a hub name with its commit (--revision)",
        ) from None
    folder = model_folder(section)
    # A model with a manifest is a student, perhaps of another party.
    if kind_of(folder / FILE_NAME):
        with private_folder() as place:
            student = admit_student(folder, place)
            digest = parse_manifest(student / FILE_NAME).digest
            weights = partial(weights_of, student)
            check_made_for(prompt, str(folder), digest.__eq__, weights)
            yield _checked(prompt, student)
        return
    check_is_model(folder)
    is_model = partial(is_digest_of, folder)
    check_made_for(prompt, str(folder), is_model, partial(weights_of, folder))
    yield _checked(prompt, folder)


def _checked(prompt: SoftPromptArtifact, folder: Path) -> FittingModel:
    """Check what configuration, tokenizer and embeddings tell, before minutes of loading."""
    facts = read_facts(folder)
    tokenizer = load_tokenizer(folder)
    check_belongs(prompt, facts, tokenizer, _MODEL)
    check_norms(prompt, largest_embedding_norm(folder))
    reader = TaskReader(prompt.task, tokenizer, masked=facts.masked, vocabulary=facts.vocabulary)
    found = context_conflicts(
        _MODEL,
        facts.context_length,
        len(prompt.embeddings),
        reader.longest,
        "the prompt was made for a longer context",
    )
    found += generation_conflicts(_MODEL, facts, prompt.task.max_response_length)
    for conflict in found:
        raise ArtifactRefused(conflict.message, conflict.hint)
    return FittingModel(folder, facts, tokenizer, reader)
