"""Conflicts between a run file and a model that prevent prompt tuning."""

from post_dist.artifacts.prompt import SoftPromptArtifact
from post_dist.config.schema import RunConfig
from post_dist.conflicts import Conflict, Layout
from post_dist.models.facts import ModelFacts
from post_dist.models.generation import generation_conflicts
from post_dist.privacy.tuned_part import tuned_kind
from post_dist.runtime.precision import precision_conflicts
from post_dist.stages.context_length import context_conflicts


def conflicts(config: RunConfig, model: ModelFacts, layout: Layout) -> list[Conflict]:
    """Find the conflicts that prevent the tune stage from running.

    Args:
        config: the run file.
        model: facts of the student, or of the target for the baseline of full prompt tuning.
        layout: the ranks; only the device matters.

    Returns:
        All conflicts.
    """
    task = config.private_task
    if task is None:
        return [Conflict("the run file lacks the section private_task", "add it")]
    # Tuning runs in one process without shards, so only the precision can conflict.
    found = precision_conflicts(config.engine, layout.device)
    # Private tuning pads every example of a masked model by at least one token.
    private = any(section.enabled for section in config.all_privacy)
    padding = int(model.masked and private)
    longest = task.max_length + task.response_length + padding
    prompt = config.tune.num_virtual_tokens
    hint = "lower tune.num_virtual_tokens or private_task.max_length"
    found += context_conflicts("the model", model.context_length, prompt, longest, hint)
    found += generation_conflicts("the model", model, task.response_length)
    found += tuned_kind(config.tune).conflicts(config.tune, model)
    return found


def start_conflicts(
    config: RunConfig, start: SoftPromptArtifact | None, model: ModelFacts
) -> list[Conflict]:
    """Find what keeps tuning from starting at a public prompt, or from text.

    Args:
        config: the run file, with the section `private_task`.
        start: the public prompt; None to start from text.
        model: facts of the student.
    """
    section = config.tune
    found = tuned_kind(section).start_conflicts(start, model)
    if start is None:
        return found
    if len(start.embeddings) != section.num_virtual_tokens:
        found.append(
            Conflict(
                f"tune.num_virtual_tokens is {section.num_virtual_tokens}, and the public prompt "
                f"has {len(start.embeddings)}",
                f"set it to {len(start.embeddings)}",
            )
        )
    if start.task.label_words != tuple(config.need_task("private_task").labels.values()):
        found.append(
            Conflict(
                "the public prompt was made for other label words than private_task.labels, or in "
                "another order",
                "make it again with these label words",
            )
        )
    return found
