"""A model's answers to the examples of a split, computed once for each prompt and stored on disk.

Shapes: N examples, C classes, R tokens of a response, n prompt tokens.
"""

import hashlib
import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from post_dist.artifacts.prompt import SoftPromptArtifact
from post_dist.artifacts.run_folder import labels_for_digest, sharding_settings
from post_dist.artifacts.task import PromptTask
from post_dist.config.schema import RunConfig
from post_dist.config.sources import Task
from post_dist.data.task_reader import TaskReader
from post_dist.data.tasks import Examples
from post_dist.files import digest_of, make_folder, write_file, writing
from post_dist.models.answers import answers_of
from post_dist.models.batch_inference import InferenceRun
from post_dist.models.language_model import LanguageModel
from post_dist.models.load import load_tokenizer, load_whole, tokenizer_fingerprint
from post_dist.runtime.distributed import World
from post_dist.runtime.precision import choose_precision
from post_dist.stages.evaluate.metrics import classification_metrics, response_metrics

log = logging.getLogger(__name__)

_ANSWERS = "answers"
"""Name of the tensor in a file of answers."""
_DIGEST = "sha256"
"""Key in the header of a file for the digest of its answers. Older versions wrote none."""


@dataclass(frozen=True)
class ModelFolders:
    """The models of an evaluation.

    Attributes:
        student: folder of the student.
        target: folder of the target. It is None for a data owner, who gets only the student's rows.
    """

    student: Path
    target: Path | None


@dataclass(frozen=True)
class EvaluationSplit:
    """The examples that a table is computed on.

    Attributes:
        task: the section of the run file.
        examples: texts with their classes or responses.
        digest: hash that identifies the examples.
    """

    task: Task
    examples: Examples
    digest: str


@dataclass(frozen=True)
class EvaluatedModel:
    """A model that answers the examples of a split.

    Attributes:
        model: the model, frozen.
        folder: its folder, with its tokenizer.
        digest: hash of the model.
    """

    model: LanguageModel
    folder: Path
    digest: str


class CachedAnswers:
    """Computes a model's answers with each of several prompts, once for all tables of a run.

    The answers are stored in a folder. A later table or a resumed run reads them from there. They
    belong to private examples, so the folder must stay with the data owner.

    Args:
        evaluated: the model.
        split: the examples.
        cache: folder for the answers.
        batch_size: number of examples in a rank's forward pass.
        world: the ranks.

    Attributes:
        examples: the examples of the split, with their classes or responses.
    """

    def __init__(
        self,
        evaluated: EvaluatedModel,
        split: EvaluationSplit,
        cache: Path,
        batch_size: int,
        world: World,
    ) -> None:
        self._model = evaluated.model
        self._tokenizer = load_tokenizer(evaluated.folder)
        # Answers depend on the prompt's values, not on the text that it was initialized from.
        task = PromptTask.of_section(split.task, init_text="")
        self._reader = TaskReader(
            task,
            self._tokenizer,
            masked=evaluated.model.masked,
            vocabulary=evaluated.model.vocabulary_size,
        )
        self.examples = split.examples
        self._encoded = self._reader.encode(split.examples.texts)
        # Path and name of the task do not change the answers, so they are not part of the key.
        settings = split.task.model_dump(mode="json", exclude={"path", "name"})
        settings["labels"] = labels_for_digest(settings["labels"])
        self._key = {"model": evaluated.digest, "rows": split.digest, "task": settings}
        self._cache = cache
        self._batch_size = batch_size
        self._world = world

    @property
    def generates(self) -> bool:
        """Whether the answers are generated responses; otherwise they are class scores."""
        return self._reader.generates

    def accepts(self, prompt: SoftPromptArtifact) -> bool:
        """Return whether this model can use a prompt that was tuned on another model."""
        same_width = prompt.embeddings.shape[1] == self._model.width
        return same_width and prompt.manifest.tokenizer == tokenizer_fingerprint(self._tokenizer)

    def answers(self, prompt: SoftPromptArtifact | None, label: str) -> torch.Tensor:
        """Return the model's answers with a prompt, or without one.

        All ranks call this method together.

        Args:
            prompt: the soft prompt, or None.
            label: name of the forward pass in progress bars.

        Returns:
            Class scores [N, C] with the prompt's adapter, and without the class biases of its task;
            or the tokens [N, R] of generated responses, padded with NO_TOKEN.
        """
        world = self._world
        prompt_digest = None if prompt is None else prompt.manifest.digest
        key = digest_of({**self._key, "prompt": prompt_digest})
        file = self._cache / f"{key[:16]}.safetensors"
        # Rank 0 reads the file for all ranks, because other nodes may see a new file only later.
        stored = world.on_main(lambda: self._stored(file, key))
        if stored is not None:
            return stored
        computed = self._compute(prompt, label).cpu()
        world.on_main(lambda: self._store(file, key, computed))
        # Ranks may differ in the last bits. A resumed run has those of rank 0.
        return world.from_main(computed)

    def metrics(self, answers: torch.Tensor) -> dict[str, Any]:
        """Compute the metrics of answers.

        Args:
            answers: class scores [N, C], or tokens [N, R] of responses.

        Returns:
            The result of `classification_metrics` or `response_metrics`.
        """
        if not self.generates:
            return classification_metrics(answers.numpy(), np.array(self.examples.classes))
        # The wanted responses are text, so the tokens are decoded.
        return response_metrics(self._reader.texts_of(answers), self.examples.responses)

    def _compute(self, prompt: SoftPromptArtifact | None, label: str) -> torch.Tensor:
        run = InferenceRun(self._batch_size, self._world, label)
        return answers_of(self._model, self._encoded, self._reader, prompt, run)

    def _stored(self, file: Path, key: str) -> torch.Tensor | None:
        """Return the answers that a file holds; None if they are not stored as they were written.

        Args:
            file: the file.
            key: what the answers depend on, as a digest.

        Raises:
            InputError: the damaged file cannot be removed.
        """
        if not file.is_file():
            return None
        with suppress(SafetensorError, OSError), safe_open(file, framework="pt") as content:
            # A flipped bit in the header may leave neither the tensor nor the digest.
            answers = content.get_tensor(_ANSWERS)
            if (content.metadata() or {}).get(_DIGEST) == _digest(key, answers):
                return answers
        # The name of the file would confirm a guess of the private examples.
        log.warning(
            "evaluate: stored answers in %s are damaged, or of an older version: they are computed "
            "again",
            self._cache,
        )
        with writing(file):
            file.unlink()
        return None

    def _store(self, file: Path, key: str, computed: torch.Tensor) -> None:
        # Only the owner may read answers to private examples.
        make_folder(self._cache, mode=0o700)
        header = {_DIGEST: _digest(key, computed)}
        write_file(file, lambda partial: save_file({_ANSWERS: computed}, partial, header))


def _digest(key: str, answers: torch.Tensor) -> str:
    """Return the sha256 of answers [N, C] or [N, R], of their shape, and of their key."""
    # With the key, a file under another file's name is noticed too.
    digest = hashlib.sha256(f"{key} {answers.dtype} {tuple(answers.shape)}".encode())
    # numpy has no bfloat16, so the bytes are hashed.
    digest.update(answers.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_answers(
    models: ModelFolders,
    digests: Mapping[str, str],
    split: EvaluationSplit,
    config: RunConfig,
    cache: Path,
    world: World,
) -> tuple[CachedAnswers, CachedAnswers | None]:
    """Load student and target, with the answers that are stored already.

    Args:
        models: student and target.
        digests: digest of `student`, and of `teacher` if there is a target.
        split: the examples to answer.
        config: gives the precision, the batch size, and how the target is divided.
        cache: folder for the answers.
        world: the ranks.
    """
    precision = choose_precision(config.engine, world.device)
    # Answers depend on the precision through rounding.
    covered = {"examples": split.digest, "precision": precision}
    student_split = replace(split, digest=digest_of(covered))
    batch_size = config.evaluate.batch_size
    # Each rank holds the whole student. The target is loaded directly into shards.
    student_model = load_whole(models.student, precision, world.device)
    student = EvaluatedModel(student_model, models.student, digests["student"])
    student_answers = CachedAnswers(student, student_split, cache, batch_size, world)
    if models.target is None:
        return student_answers, None

    # Loads DeepSpeed, which an owner who evaluates the student alone does without.
    from post_dist.models.sharded import load_sharded

    target_model = load_sharded(models.target, config.engine, precision, world)
    target = EvaluatedModel(target_model, models.target, digests["teacher"])
    # Those of a sharded model also depend on what sharding does to its weights.
    target_digest = digest_of(covered | sharding_settings(config.engine))
    target_split = replace(split, digest=target_digest)
    return student_answers, CachedAnswers(target, target_split, cache, batch_size, world)
