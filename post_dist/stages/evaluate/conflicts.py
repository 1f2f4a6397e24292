"""The conflicts of an evaluation: prompts and examples that do not suit the models."""

from collections.abc import Sequence
from dataclasses import dataclass

from post_dist.config.schema import RunConfig
from post_dist.conflicts import Conflict, Layout
from post_dist.models.facts import ModelFacts
from post_dist.models.generation import generation_conflicts
from post_dist.runtime.engine_conflicts import engine_conflicts
from post_dist.runtime.precision import precision_conflicts
from post_dist.stages.context_length import context_conflicts


@dataclass(frozen=True)
class PromptedModel:
    """A model of an evaluation with its longest prompt.

    Attributes:
        whose: name of the model in messages, such as `the student`.
        facts: facts of the model.
        num_virtual_tokens: number of vectors of the longest prompt in front of it; 0 without one.
    """

    whose: str
    facts: ModelFacts
    num_virtual_tokens: int


def conflicts(config: RunConfig, models: Sequence[PromptedModel], layout: Layout) -> list[Conflict]:
    """Find what keeps an evaluation from running.

    Args:
        config: the run file.
        models: the student, and the target if there is one.
        layout: the ranks. A data owner loads no sharded model, so only their device matters then.

    Returns:
        All conflicts.
    """
    task = config.private_task
    if task is None:
        return [Conflict("the run file lacks the section private_task", "add it")]
    if config.teacher is None:
        found = precision_conflicts(config.engine, layout.device)
    else:
        found = engine_conflicts(config.engine, layout)
    longest = task.max_length + task.response_length
    for model in models:
        found += context_conflicts(
            model.whose,
            model.facts.context_length,
            model.num_virtual_tokens,
            longest,
            _hint(model),
        )
        found += generation_conflicts(model.whose, model.facts, task.response_length)
    return found


def _hint(model: PromptedModel) -> str:
    """Say what would make prompt and texts fit into the model's context."""
    if not model.num_virtual_tokens:
        return "lower private_task.max_length"
    # `evaluate` reads finished prompts, so a shorter prompt must be tuned first.
    return "lower private_task.max_length, or tune with a lower tune.num_virtual_tokens"
