"""What prompt tuning cannot do with a run file and a model."""

from post_dist.config.schema import RunConfig
from post_dist.conflicts import Conflict, Layout
from post_dist.models.facts import ModelFacts
from post_dist.runtime.shard_group import precision_conflicts
from post_dist.stages.room import room_conflicts


def conflicts(config: RunConfig, model: ModelFacts, layout: Layout) -> list[Conflict]:
    """Find what keeps the tune stage from running.

    Args:
        config: the run file; its section `private_task` must be there.
        model: facts of the student, or of the target for the baseline of full prompt tuning.
        layout: the ranks; tuning itself runs in one process and shards nothing.

    Returns:
        All conflicts.
    """
    task = config.private_task
    if task is None or task.template is None:
        return [Conflict("the run file lacks the section private_task", "add it")]
    # Tuning runs in one process and shards nothing, so only the precision counts.
    found = precision_conflicts(config.engine, layout.device)
    # Private tuning pads an example of a masked model by one token: all of them have padding.
    private = any(section.enabled for section in config.all_privacy)
    padding = int(model.masked and private)
    longest = task.max_length + task.response_length + padding
    prompt = config.tune.num_virtual_tokens
    found += room_conflicts("the model", model.context_length, prompt, longest)
    return found
