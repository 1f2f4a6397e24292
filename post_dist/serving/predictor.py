"""Predict with a soft prompt on its model, on one device.

Shapes: N texts, C classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from pydantic import ValidationError

from post_dist.admission.door import admit_student
from post_dist.artifacts.manifest import FILE_NAME, parse_manifest
from post_dist.artifacts.prompt import SoftPromptArtifact
from post_dist.config.models import Engine, Teacher
from post_dist.config.precision import PrecisionChoice
from post_dist.conflicts import raise_conflicts
from post_dist.data.task_reader import TaskReader
from post_dist.errors import ArtifactRefused, InputError
from post_dist.files import fingerprint
from post_dist.models.answers import answers_of
from post_dist.models.batch_inference import InferenceRun
from post_dist.models.embedding_table import largest_embedding_norm
from post_dist.models.facts import read_facts
from post_dist.models.language_model import LanguageModel
from post_dist.models.load import load_config, load_tokenizer, load_whole, model_folder
from post_dist.runtime.distributed import World, alone
from post_dist.runtime.precision import choose_precision
from post_dist.runtime.shard_group import precision_conflicts
from post_dist.stages.prompt_origin import check_belongs, check_norms
from post_dist.stages.room import room_conflicts

_MODEL = "the model"


@dataclass(frozen=True)
class ClassPrediction:
    """The class of a text.

    Attributes:
        label: name of the class: its value in the owner's label column.
        index: number of the class, from 0.
        scores: probability of each class, by its name.
    """

    label: str
    index: int
    scores: dict[str, float]


@dataclass(frozen=True)
class Response:
    """The text that the model generates for a text.

    Attributes:
        response: the generated text.
    """

    response: str


Predictions = list[ClassPrediction] | list[Response]


class Predictor:
    """A prompt on its loaded model.

    Args:
        prompt: the prompt.
        model: the model that it was made for, frozen.
        reader: the prompt's task, bound to the model's tokenizer.
        world: this process and its device.
    """

    def __init__(
        self, prompt: SoftPromptArtifact, model: LanguageModel, reader: TaskReader, world: World
    ) -> None:
        self._prompt = prompt
        self._model = model
        self._reader = reader
        self._world = world

    def predict(self, texts: Sequence[str], batch_size: int = 32) -> Predictions:
        """Predict the class of each text, or generate the response to it.

        Args:
            texts: the texts, without the template.
            batch_size: number of texts in a forward pass. Texts of like length go together.

        Returns:
            One prediction for each text, in their order.
        """
        if not texts:
            return []
        # The stages strip a text too, after composing it from its columns.
        encoded = self._reader.encode([text.strip() for text in texts])
        run = InferenceRun(batch_size, self._world, "predict")
        answers = answers_of(self._model, encoded, self._reader, self._prompt, run)
        if self._reader.generates:
            return [Response(text) for text in self._reader.texts_of(answers)]
        biases = self._prompt.task.class_biases
        return self._classes(answers + torch.tensor(biases) if biases else answers)

    def _classes(self, scores_NC: torch.Tensor) -> list[ClassPrediction]:
        names = self._prompt.task.class_names
        # Two probabilities may be equal where their scores still differ.
        chosen = scores_NC.argmax(dim=1).tolist()
        found = []
        for index, row in zip(chosen, scores_NC.softmax(dim=1).tolist(), strict=True):
            found.append(ClassPrediction(names[index], index, dict(zip(names, row, strict=True))))
        return found


def load_predictor(
    prompt: SoftPromptArtifact, model: str, revision: str | None, precision: PrecisionChoice
) -> Predictor:
    """Load a model, and check that a prompt belongs to it.

    Args:
        prompt: the prompt.
        model: folder or hub name of the model.
        revision: commit of a hub model.
        precision: precision of the weights.

    Raises:
        ArtifactRefused: the prompt belongs to another model, or the model is a student that does
            not pass its checks.
        InputError: the model cannot be loaded.
        EnvironmentFault: the hub cannot be reached.
    """
    world = alone()
    engine = Engine(precision=precision)
    raise_conflicts("predict", precision_conflicts(engine, world.device.type))
    try:
        section = Teacher(path=model, revision=revision)
    except ValidationError:
        raise InputError(
            f"{model} is not a folder",
            "give the folder of a model, or a hub name with its commit (--revision)",
        ) from None
    folder = model_folder(section)
    # A model with a manifest is a student, perhaps of another party.
    if (folder / FILE_NAME).exists():
        with TemporaryDirectory() as place:
            student = admit_student(folder, Path(place))
            _check_lineage(prompt, folder, parse_manifest(student / FILE_NAME).digest)
            return _load(prompt, student, engine, world)
    load_config(folder)
    # Only a tuned prompt names the files of such a model. Hashing a large LLM would take minutes.
    if not _is_transferred(prompt):
        _check_lineage(prompt, folder, fingerprint(folder))
    return _load(prompt, folder, engine, world)


def _is_transferred(prompt: SoftPromptArtifact) -> bool:
    """Return whether a prompt is for a large LLM, which its lineage does not name."""
    return "source prompt" in prompt.manifest.parents


def _check_lineage(prompt: SoftPromptArtifact, folder: Path, digest: str) -> None:
    """Check that a prompt was not made for another model than this one.

    A student has the width and the tokenizer of its teacher, so only the lineage tells them apart.

    Raises:
        ArtifactRefused: it was made for another model, by its own lineage.
    """
    tuned_here = prompt.manifest.parents.get("model") == digest
    if _is_transferred(prompt):
        # The lineage names the student that the source of the prompt was tuned on.
        if tuned_here:
            raise ArtifactRefused(
                f"the prompt was transferred from {folder} to a large LLM",
                "give the large LLM, or the prompt that was tuned on this student",
            )
    elif not tuned_here:
        raise ArtifactRefused(
            f"the prompt was tuned on another model than {folder}",
            "give the model that it was tuned on; `transfer` makes a prompt for the large LLM",
        )


def _load(prompt: SoftPromptArtifact, folder: Path, engine: Engine, world: World) -> Predictor:
    """Load a model whose files have been checked, after its configuration and tokenizer."""
    # Check before the weights are loaded, which may take minutes.
    facts = read_facts(folder)
    tokenizer = load_tokenizer(folder)
    check_belongs(prompt, facts, tokenizer, _MODEL)
    check_norms(prompt, largest_embedding_norm(folder))
    reader = TaskReader(prompt.task, tokenizer, masked=facts.masked)
    found = room_conflicts(_MODEL, facts.context_length, len(prompt.embeddings), reader.longest)
    if found:
        raise ArtifactRefused(found[0].message, "the prompt was made for a longer context")
    model = load_whole(folder, choose_precision(engine, world.device), world.device)
    return Predictor(prompt, model, reader, world)
