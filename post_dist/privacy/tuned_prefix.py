"""A prefix in place of the prompt that it starts from, as the part that tuning trains.

No hooks are needed: the keys and values of virtual tokens enter the model through its cache, one
for each example.
"""

from dataclasses import dataclass
from typing import ClassVar

from post_dist.artifacts.prefix import Prefix
from post_dist.artifacts.prompt import Adapter, SoftPromptArtifact
from post_dist.config.schema import RunConfig, Tune
from post_dist.conflicts import Conflict
from post_dist.models.classifier import PromptInput
from post_dist.models.facts import ModelFacts
from post_dist.models.prefix_layers import initial_prefix, prefix_conflicts
from post_dist.models.tuning_task import TuningTask
from post_dist.privacy.tuned_adapter import TunedAdapter


@dataclass(frozen=True)
class TunedPrefix(TunedAdapter):
    """The keys and values of a prefix."""

    kind: ClassVar[type[Prefix]] = Prefix

    @staticmethod
    def start(task: TuningTask, config: RunConfig, public: SoftPromptArtifact | None) -> Adapter:
        """Return the keys and values of the prompt, so that nothing has changed yet."""
        return initial_prefix(task.model, task.start_nd)

    @staticmethod
    def conflicts(section: Tune, model: ModelFacts) -> list[Conflict]:
        """Find that a student keeps no keys and values, or not of one shape in all layers."""
        # Facts come from the configuration, so nothing is loaded to find this out.
        return prefix_conflicts(model, section.num_virtual_tokens)

    @staticmethod
    def start_conflicts(start: SoftPromptArtifact | None, model: ModelFacts) -> list[Conflict]:
        """Return none: a prefix starts from a public prompt, or from the embeddings of a text."""
        return []

    @staticmethod
    def prompt_in_front(task: TuningTask, *, shared: bool = False) -> PromptInput:
        """Return no prompt: the prefix runs in its place."""
        return PromptInput()

    @staticmethod
    def probe(task: TuningTask, section: Tune) -> Prefix:
        """Return the prefix of the prompt."""
        return initial_prefix(task.model, task.start_nd)
