"""A LoRA on the student, behind a fixed prompt, as the part that tuning trains."""

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch

from post_dist.artifacts.lora import Lora
from post_dist.artifacts.prompt import Adapter, SoftPromptArtifact
from post_dist.config.schema import RunConfig, Tune
from post_dist.conflicts import Conflict
from post_dist.models.classifier import PromptInput
from post_dist.models.facts import ModelFacts
from post_dist.models.lora_layers import lora_conflicts, lowest_layer, untrained_lora
from post_dist.models.tuning_task import TuningTask
from post_dist.privacy.lower_states import LowerStates, are_kept
from post_dist.privacy.micro_batches import padded_length
from post_dist.privacy.plan import declared_plan
from post_dist.privacy.tuned_adapter import TunedAdapter


@dataclass(frozen=True)
class TunedLora(TunedAdapter):
    """The factors of a LoRA."""

    kind: ClassVar[type[Lora]] = Lora

    @staticmethod
    def start(task: TuningTask, config: RunConfig, public: SoftPromptArtifact | None) -> Adapter:
        """Return a LoRA that changes nothing yet."""
        return untrained_lora(task.model, config.tune.lora_settings, config.seed)

    @staticmethod
    def conflicts(section: Tune, model: ModelFacts) -> list[Conflict]:
        """List the target modules that the student lacks, and more upper layers than it has."""
        # Facts come from the configuration, so nothing is loaded to find this out.
        return lora_conflicts("tune", section.lora_settings, model.linears, model.family)

    @staticmethod
    def start_conflicts(start: SoftPromptArtifact | None, model: ModelFacts) -> list[Conflict]:
        """Return none: a LoRA stands behind a public prompt, or behind the embeddings of a text."""
        return []

    @staticmethod
    def prompt_in_front(task: TuningTask, *, shared: bool = False) -> PromptInput:
        """Return the fixed prompt."""
        return PromptInput(prompt=task.start_nd, shared=shared)

    @staticmethod
    def probe(task: TuningTask, section: Tune) -> Lora:
        """Return a LoRA of random factors. A second factor of zeros would hide what rounds."""
        lora = untrained_lora(task.model, section.lora_settings, seed=0)
        generator = torch.Generator().manual_seed(1)
        device = task.model.model.device
        values = []
        # The scale keeps a product about as large as its input.
        for factor in lora.values:
            random = torch.randn(factor.shape, generator=generator)
            values.append((random / factor.shape[1] ** 0.5).to(device))
        return lora.with_values(values)

    def __post_init__(self) -> None:
        """Read the examples before the first step, from which on a run spends its budget."""
        _ = self.below

    @cached_property
    def below(self) -> LowerStates | None:
        """The outputs of the layers below the LoRA, if keeping them saves time."""
        # Without privacy, the examples come in other micro-batches in each epoch.
        if not self.config.privacy.enabled:
            return None
        model = self.task.model
        layers = lowest_layer(model, self.task.need(Lora))
        tokens = len(self.task.start_nd) + padded_length(self.task)
        of_example = tokens * model.width * model.model.dtype.itemsize
        # The noise multiplier does not matter here.
        if not layers or not are_kept(declared_plan(self.config, 1.0), of_example):
            return None
        return LowerStates(self.task, layers, self.sizes, self.world)
