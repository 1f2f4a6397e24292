"""Tune without privacy, for comparison. The result may reveal the training examples."""

import torch

from post_dist.artifacts.run_folder import RunFolder
from post_dist.models.tuning_task import TuningTask
from post_dist.privacy.micro_batches import planned_sizes, size_of_longest
from post_dist.privacy.tuned_part import tuned_kind
from post_dist.runtime.distributed import World
from post_dist.runtime.optimizers import result_of
from post_dist.runtime.private_metrics import open_private_metrics
from post_dist.stages.prompt_training import PromptRun, train_prompt


def tune_without_privacy(
    folder: RunFolder, task: TuningTask, world: World, resume: str
) -> list[torch.Tensor]:
    """Tune a prompt, or an adapter behind it. The losses go to a file that only the owner can read.

    Args:
        folder: holds checkpoints and losses.
        task: the model, the examples, and the prompt and adapter to start from.
        world: this process, alone.
        resume: `auto` or `never`.

    Returns:
        The tuned parameters.
    """
    section = folder.config.tune
    sizes = planned_sizes(task, size_of_longest(section, task))
    part = tuned_kind(section)(task, folder.config, sizes, world)
    parameters = part.parameters()
    optimizer = part.optimizer(parameters, section.learning_rate, section.steps)
    run = PromptRun(
        parameters,
        optimizer,
        section,
        folder,
        open_metrics=open_private_metrics,
        show_loss=False,
    )
    first_step = run.restore_newest(resume, world)
    train_prompt(run, lambda step: part.loss(parameters, step), first_step, world)
    return result_of(parameters, optimizer)
