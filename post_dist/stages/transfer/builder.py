"""Build the objective of each prompt: run the forwards that do not depend on training, once.

Shapes: N public examples, C classes, R tokens of a response, n prompt tokens, d width.
"""

import logging
from collections.abc import Hashable
from dataclasses import dataclass, replace
from functools import partial

import torch
from transformers import PreTrainedTokenizerBase

from post_dist.artifacts.head import LinearHead
from post_dist.artifacts.prompt import Adapter
from post_dist.artifacts.task import PromptTask
from post_dist.config.schema import Transfer
from post_dist.data.task_reader import TaskReader
from post_dist.data.template import Encoded
from post_dist.losses.transfer import proxy_logits, share_matching_offsets
from post_dist.models.answers import check_finite
from post_dist.models.language_model import LanguageModel
from post_dist.runtime.distributed import World
from post_dist.stages.transfer.objective import FixedOutputs, ModelPair, TransferObjective
from post_dist.stages.transfer.public_reading import PromptedStates, PublicReading
from post_dist.stages.transfer.public_statistics import (
    LEAST_INFORMATION,
    alpha_by_agreement,
    class_information,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tokenizers:
    """The tokenizers of student and target.

    They may differ if the loss compares class scores. Each model then has its own tokens for the
    label words.

    Attributes:
        student: the student's tokenizer.
        target: the target's tokenizer.
    """

    student: PreTrainedTokenizerBase
    target: PreTrainedTokenizerBase


@dataclass(frozen=True)
class PublicExamples:
    """The public text that a transfer reads.

    Attributes:
        texts: the texts.
        responses: a response to each text, for prompts that generate text; empty for a task with
            classes.
        template: template for the texts; None to use the template of each prompt's own task.
    """

    texts: list[str]
    responses: list[str]
    template: str | None = None


def own_reading(task: PromptTask, template: str | None) -> PromptTask:
    """Return a prompt's task, as it reads the public text.

    The public text may need its own template, such as one for another kind of review. Label words,
    lengths and class biases are those of the prompt's owner.

    Args:
        task: task of the source prompt.
        template: template of the public task; None to use that of the prompt.
    """
    return replace(task, template=template or task.template)


class ObjectiveBuilder:
    """Builds the objectives of all prompts for one pair of student and target.

    The public examples are encoded, and read without a prompt, once for all prompts with the same
    task. The builder keeps the results.

    Args:
        models: student and target.
        tokenizers: their tokenizers.
        public: the public examples.
        world: the ranks, which all build.

    Attributes:
        states: hidden states behind the last prompt.
    """

    def __init__(
        self,
        models: ModelPair,
        tokenizers: Tokenizers,
        public: PublicExamples,
        world: World,
    ) -> None:
        self._models = models
        self._tokenizers = tokenizers
        self._public = public
        self._world = world
        self.states = PromptedStates()
        self._unprompted_cache: dict[Hashable, torch.Tensor] = {}
        self._encoded_cache: dict[Hashable, list[Encoded]] = {}

    def build(
        self,
        task: PromptTask,
        source_nd: torch.Tensor,
        section: Transfer,
        adapter: Adapter | None = None,
    ) -> TransferObjective:
        """Build the objective of one prompt.

        Args:
            task: task of the source prompt.
            source_nd: the source prompt [n, d], on the student's device.
            section: settings of the loss.
            adapter: what was tuned behind the source prompt or in its place; None if it was the
                prompt itself.

        Returns:
            The objective.

        Raises:
            InputError: the template does not suit the models, or a label word is not one token.
            OutputsNotFinite: the student's outputs with the prompt overflow.
        """
        log.info(
            "transfer: %d public texts, objective %s on the %s",
            len(self._public.texts),
            section.objective,
            section.scores,
        )
        task = own_reading(task, self._public.template)
        student = self._reading(
            "student", self._models.student, self._tokenizers.student, task, section
        )
        target = self._reading(
            "target", self._models.target, self._tokenizers.target, task, section
        )

        # Run the forwards that do not depend on the trained prompt. All ranks run them in the same
        # order, because each forward of a sharded target needs all ranks.
        subtracts = section.subtracts_student
        outputs = FixedOutputs(
            source=self._unprompted_outputs(student) if subtracts else None,
            source_prompted=self._prompted_outputs(student, source_nd, adapter),
            target=self._unprompted_outputs(target),
        )
        check_finite(outputs.source_prompted)

        # Compute statistics of the classes. A task that generates text has none.
        statistics: dict[str, float] = {}
        if student.reader.num_classes:
            prompted_NC = student.class_scores(outputs.source_prompted, prompted=True)
            statistics["class_information_nats"] = class_information(prompted_NC)
            if section.alpha == "auto" and outputs.source is not None:
                source_NC = student.class_scores(outputs.source)
                target_NC = target.class_scores(outputs.target)
                alpha = alpha_by_agreement(source_NC, prompted_NC, target_NC)
                statistics["alpha"] = alpha
                # The artifact's manifest then holds the number instead of `auto`.
                section = section.model_copy(update={"alpha": alpha})
            log.info("transfer: statistics of the public text: %s", _listed(statistics))
            if statistics["class_information_nats"] < LEAST_INFORMATION:
                log.warning(
                    "transfer: the source prompt says nearly the same of all public texts, so "
                    "there is little to transfer; compare the public text with the task"
                )

        return TransferObjective(
            section=section,
            reader=target.reader,
            examples=target.examples,
            outputs=outputs,
            offsets=_class_offsets(section, outputs),
            statistics=statistics,
        )

    def _reading(
        self,
        name: str,
        model: LanguageModel,
        tokenizer: PreTrainedTokenizerBase,
        task: PromptTask,
        section: Transfer,
    ) -> PublicReading:
        """Bind a model to a task and the public examples."""
        bind = partial(
            TaskReader, tokenizer=tokenizer, masked=model.masked, vocabulary=model.vocabulary_size
        )
        reader = bind(task)
        examples = self._encoded(name, reader)
        if reader.generates:
            # A state is stored for each token that a response may have. The owner of the prompt
            # says how many, and the public responses may have far fewer.
            longest = max(len(example.response) for example in examples)
            reader = bind(replace(task, max_response_length=longest))
        return PublicReading(name, model, reader, examples, section, self._world)

    def _encoded(self, name: str, reader: TaskReader) -> list[Encoded]:
        """Encode the public examples for a model, once for all prompts with the same task."""
        key = (name, _without_prompt(reader.task))
        if key not in self._encoded_cache:
            examples = reader.encode(self._public.texts, self._public.responses)
            self._encoded_cache[key] = examples
        return self._encoded_cache[key]

    def _prompted_outputs(
        self, student: PublicReading, source_nd: torch.Tensor, adapter: Adapter | None
    ) -> torch.Tensor:
        """Compute the student's outputs with the source prompt."""
        if not isinstance(adapter, LinearHead):
            return student.outputs(source_nd, "student + prompt", adapter)
        layers = adapter.layers(student.model.width, len(student.model.layers))
        return student.headed_scores(self.states.of(student, source_nd, layers), adapter)

    def _unprompted_outputs(self, reading: PublicReading) -> torch.Tensor:
        """Compute a model's outputs without a prompt, once for all prompts with the same task."""
        key = (reading.name, reading.section.scores, _without_prompt(reading.reader.task))
        if key not in self._unprompted_cache:
            self._unprompted_cache[key] = reading.outputs(None, reading.name)
        return self._unprompted_cache[key]


def _without_prompt(task: PromptTask) -> PromptTask:
    """Return a task without what has an effect behind a prompt alone."""
    return replace(task, init_text="", class_biases=())


def _class_offsets(section: Transfer, outputs: FixedOutputs) -> torch.Tensor:
    """Compute the offsets of the proxy's class scores, if the settings ask for them.

    Returns:
        Offsets [C], or a single zero [1] without offsets.
    """
    if not section.match_class_shares:
        return torch.zeros(1)
    # The proxy adds up the preferences of two models for some classes. The prompted student has
    # learned the decision threshold of the task, so the offsets give the proxy its class shares.
    shares_C = outputs.source_prompted.double().softmax(dim=1).mean(dim=0)
    strength = section.proxy_lambda
    proxy_NC = proxy_logits(outputs.source, outputs.source_prompted, outputs.target, strength)
    offsets = share_matching_offsets(proxy_NC, shares_C)
    log.info(
        "transfer: class offsets %s match the class shares of the prompted student",
        [round(float(offset), 3) for offset in offsets],
    )
    return offsets


def _listed(statistics: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in statistics.items())
