"""Find the conflicts of tuning and transfer for all prompts of one run file.

A stage sees one prompt at a time. `plan` and `check` look at all prompts before any stage starts.
"""

from collections.abc import Sequence

from post_dist.config.schema import RunConfig
from post_dist.conflicts import Conflict, Layout
from post_dist.models.facts import ModelFacts
from post_dist.stages.transfer.conflicts import SourcePrompt, TransferModels
from post_dist.stages.transfer.conflicts import conflicts as conflicts_of_transfer
from post_dist.stages.transfer.published import with_published_transfer
from post_dist.stages.tune.conflicts import conflicts as conflicts_of_tuning


def tune_conflicts(
    config: RunConfig, student: ModelFacts, target: ModelFacts | None, layout: Layout
) -> list[Conflict]:
    """Find what keeps the prompts of a run file from being tuned.

    Args:
        config: the run file. Without a private task, another party tunes the prompt, and there is
            no conflict.
        student: the model that prompts are tuned on.
        target: the large model, for the baseline of full prompt tuning; None without a teacher.
        layout: the ranks of the stage.
    """
    if config.private_task is None:
        return []
    # The baseline of full prompt tuning tunes on the target, with the same texts.
    found = conflicts_of_tuning(config, student, layout)
    if target is not None and "full prompt tuning" in config.evaluate.baselines:
        found += conflicts_of_tuning(config, target, layout)
    return list(dict.fromkeys(found))


def transfer_conflicts(
    config: RunConfig, models: TransferModels, prompts: Sequence[SourcePrompt], layout: Layout
) -> list[Conflict]:
    """Find what keeps prompts from being transferred.

    The conflicts of the baseline `published transfer` are included if the run file asks for it.

    Args:
        config: the run file.
        models: student and target.
        prompts: the prompts to transfer.
        layout: the ranks of the stage.
    """
    # The owners' prompts differ in length and task, so each is compared with the models.
    found = []
    for prompt in prompts:
        arguments = (models, prompt, layout)
        own = conflicts_of_transfer(config, *arguments)
        found += own
        if "published transfer" in config.evaluate.baselines:
            published = conflicts_of_transfer(with_published_transfer(config), *arguments)
            found += [_of_baseline(each) for each in published if each not in own]
    return list(dict.fromkeys(found))


def _of_baseline(conflict: Conflict) -> Conflict:
    """Name the baseline in a conflict that only the baseline's settings have."""
    return Conflict(
        f"the baseline published transfer: {conflict.message}",
        "leave it out of evaluate.baselines",
    )
