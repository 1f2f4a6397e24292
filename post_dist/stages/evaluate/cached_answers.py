"""What a model answers to the rows of a split, with each of several prompts.

Shapes: N rows, C classes, R tokens of a response.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from post_dist.artifacts.prompt import SoftPromptArtifact
from post_dist.config.sources import Task
from post_dist.data.tasks import Examples
from post_dist.data.template import NO_TOKEN, Template
from post_dist.data.verbalizer import Verbalizer
from post_dist.files import digest_of, write_file, writing
from post_dist.models.batch_inference import answers
from post_dist.models.generation import write_responses
from post_dist.models.language_model import LanguageModel
from post_dist.models.load import load_tokenizer, tokenizer_fingerprint
from post_dist.models.prompt_init import check_room
from post_dist.runtime.distributed import World
from post_dist.stages.evaluate.metrics import measure_classes, measure_responses


@dataclass(frozen=True)
class Questions:
    """The rows of a split, what is right, and a digest of all that decides the rows."""

    task: Task
    examples: Examples
    digest: str


class Scorer:
    """One model's answers, each computed once for all tables of a run's folder, and kept if one is stopped.

    They are of private rows: what keeps them is for the owner alone.

    Args:
        model: frozen.
        model_folder: with its tokenizer.
        digest: of the model.
        questions: the rows.
        kept: the folder for what has been computed.
        batch_size: rows at once.
        world: the ranks.
    """

    def __init__(
        self,
        model: LanguageModel,
        model_folder: Path,
        digest: str,
        questions: Questions,
        kept: Path,
        batch_size: int,
        world: World,
    ) -> None:
        task = questions.task
        most = task.response_length
        self.model, self.tokenizer = model, load_tokenizer(model_folder)
        self._template = Template(
            str(task.template),
            self.tokenizer,
            task.max_length,
            masked=model.masked,
            max_response_length=most,
        )
        self._verbalizer = Verbalizer(
            tuple(task.labels.values()), self.tokenizer, allow_multi_token=task.allow_multi_token
        )
        self._examples, self._rows = (
            questions.examples,
            self._template.encode(questions.examples.texts),
        )
        settings = task.model_dump(mode="json", exclude={"path", "name"})
        self._key = {"model": digest, "rows": questions.digest, "task": settings}
        self._kept, self._batch_size, self._world = kept, batch_size, world

    def takes(self, prompt: SoftPromptArtifact) -> bool:
        """Whether the model can read a prompt that was tuned on another."""
        return prompt.embeddings.shape[
            1
        ] == self.model.width and prompt.manifest.tokenizer == tokenizer_fingerprint(self.tokenizer)

    def __call__(self, prompt: SoftPromptArtifact | None, label: str) -> torch.Tensor:
        """Class scores [N, C], without the biases of the prompt's task; or the tokens [N, R] of what the model writes.

        Raises:
            InputError: prompt and rows do not fit into the model's context.
        """
        world = self._world
        check_room(
            self.model, 0 if prompt is None else len(prompt.embeddings), self._template.longest
        )
        key = digest_of({**self._key, "prompt": None if prompt is None else prompt.manifest.digest})
        place = self._kept / f"{key[:16]}.safetensors"
        if not world.from_main(place.exists()):
            made = {
                "answers": self._answers(
                    None if prompt is None else prompt.embeddings.to(world.device), label
                )
            }

            def write() -> None:
                with writing(place):
                    self._kept.mkdir(mode=0o700, exist_ok=True)
                write_file(place, lambda partial: save_file(made, partial))

            world.on_main(write)
        return world.from_main(load_file(place)["answers"] if world.is_main else torch.empty(0))

    def _answers(self, prompt_nd: torch.Tensor | None, label: str) -> torch.Tensor:
        how: dict[str, Any] = {"batch_size": self._batch_size, "world": self._world, "label": label}
        if self._template.max_response_length:
            return write_responses(
                self.model,
                self._rows,
                self._template,
                prompt_nd,
                self.tokenizer.eos_token_id,
                **how,
            )
        return answers(
            self.model, self._rows, self._template, prompt_nd, self._verbalizer.scores, **how
        )

    def measure(self, answered: torch.Tensor) -> dict[str, Any]:
        """How good answers are."""
        if not self._template.max_response_length:
            return measure_classes(answered.numpy(), np.array(self._examples.classes))
        texts = [
            str(self.tokenizer.decode([token for token in tokens if token != NO_TOKEN]))
            for tokens in answered.tolist()
        ]
        return measure_responses(texts, self._examples.responses)
