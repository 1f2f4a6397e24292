"""A prompt or LoRA that is trained on the target, and which of them are trained together.

Shapes: n prompt tokens, d width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from post_dist.artifacts.lora import Lora
from post_dist.artifacts.prompt import SoftPromptArtifact
from post_dist.artifacts.run_folder import RunFolder
from post_dist.config.schema import Transfer
from post_dist.models.language_model import LanguageModel
from post_dist.models.lora_layers import untrained_lora
from post_dist.models.prompt_init import prompt_from_text
from post_dist.runtime.distributed import World
from post_dist.runtime.optimizers import make_optimizer
from post_dist.runtime.trackers import open_public_metrics
from post_dist.stages.prompt_training import PromptRun
from post_dist.stages.transfer.builder import Tokenizers
from post_dist.stages.transfer.objective import ModelPair, TransferObjective


@dataclass(frozen=True)
class TransferRequest:
    """A request to transfer one soft prompt.

    Attributes:
        folder: the run folder of this transfer, with its settings.
        source: the soft prompt that was tuned on the student.
    """

    folder: RunFolder
    source: SoftPromptArtifact


@dataclass(frozen=True)
class TransferJob:
    """One prompt, or LoRA behind a prompt, that is trained on the target.

    Attributes:
        source: the prompt that was tuned on the student.
        objective: the loss.
        prompt_nd: the new prompt [n, d], in fp32.
        lora: the LoRA behind it, which is then trained in its place; None without one.
        run: the tensors that are trained, with their optimizer and their folder.
        first_step: step from which training resumes.
    """

    source: SoftPromptArtifact
    objective: TransferObjective
    prompt_nd: torch.Tensor
    lora: Lora | None
    run: PromptRun
    first_step: int


@dataclass(frozen=True)
class _BatchShape:
    """The properties that jobs must share to be trained together."""

    num_virtual_tokens: int
    max_response_length: int
    steps: int
    batch_size: int
    first_step: int
    at_once: int


def prepared_job(
    request: TransferRequest,
    objective: TransferObjective,
    models: ModelPair,
    tokenizers: Tokenizers,
    world: World,
    resume: str,
) -> TransferJob:
    """Prepare the training of a request. All ranks call it.

    Args:
        request: the prompt to transfer.
        objective: its loss.
        models: student and target.
        tokenizers: their tokenizers.
        world: the ranks.
        resume: `auto` resumes from the newest checkpoint; `never` deletes checkpoints first.
    """
    config = request.folder.config
    section = config.transfer
    start_nd = start_on_target(models, tokenizers, request.source, section, world)
    lora = _lora(models.target, section, config.seed, world)
    # The fixed prompt in front of a LoRA needs no checkpoint: it is the same whenever it is made.
    parameters = [start_nd] if lora is None else list(lora.factors.values())
    # Adam is also the optimizer of the published transfer.
    optimizer = make_optimizer("adam", [{"params": parameters, "lr": section.learning_rate}])
    run = PromptRun(
        parameters,
        optimizer,
        section,
        request.folder,
        # The losses come from public text, so they are public.
        open_metrics=open_public_metrics,
        show_loss=True,
    )
    first_step = run.restore_newest(resume, world)
    return TransferJob(request.source, objective, start_nd, lora, run, first_step)


def start_on_target(
    models: ModelPair,
    tokenizers: Tokenizers,
    source: SoftPromptArtifact,
    section: Transfer,
    world: World,
) -> torch.Tensor:
    """Compute the initial values [n, d] of the prompt on the target, in fp32. All ranks call it.

    `transfer.trained_share` interpolates between the target's embeddings of a text (0) and the
    source prompt (1).

    Args:
        models: student and target.
        tokenizers: their tokenizers.
        source: the source prompt.
        section: settings of the transfer.
        world: the ranks.
    """
    source_nd = source.embeddings.to(world.device)
    # A sharded target needs all ranks to gather its embeddings.
    start_nd = prompt_from_text(
        models.target, tokenizers.target, source.task.init_text, len(source_nd)
    )
    # The conflicts allow another width of the source prompt only with a share of 0.
    if section.trained_share:
        start_nd = torch.lerp(start_nd, source_nd, section.trained_share)
    return start_nd.to(source_nd.device, torch.float32).clone()


def _lora(target: LanguageModel, section: Transfer, seed: int, world: World) -> Lora | None:
    """Return the LoRA before its first step; None if the prompt is trained."""
    if section.lora is None:
        return None
    lora = untrained_lora(target, section.lora, seed)
    # Training changes the factors in place, so they lie where the target reads them.
    return lora.with_values([factor.to(world.device) for factor in lora.factors.values()])


def trained_together(jobs: Sequence[TransferJob]) -> list[list[TransferJob]]:
    """Divide jobs into groups of one shape, each of as many jobs as may be trained at once."""
    by_shape: dict[_BatchShape, list[TransferJob]] = {}
    for job in jobs:
        shape = _BatchShape(
            num_virtual_tokens=len(job.source.embeddings),
            max_response_length=job.source.task.max_response_length,
            steps=job.run.section.steps,
            batch_size=job.run.section.batch_size,
            first_step=job.first_step,
            at_once=job.objective.section.trained_at_once,
        )
        by_shape.setdefault(shape, []).append(job)

    # Each prompt needs memory for its own examples, so the run file limits the size of a group.
    groups = []
    for shape, same_shape in by_shape.items():
        for start in range(0, len(same_shape), shape.at_once):
            groups.append(same_shape[start : start + shape.at_once])
    return groups
