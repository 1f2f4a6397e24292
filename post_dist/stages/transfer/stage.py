"""Stage 3, run by the provider: transfer soft prompts from the student to the large LLM.

The stage reads only public text. It gets no private section of the run file, and it reads no label
column.

Shapes: n prompt tokens, d width.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from post_dist.artifacts.prompt import SoftPromptArtifact
from post_dist.artifacts.run_folder import RunFolder
from post_dist.conflicts import Conflict, raise_conflicts
from post_dist.data.order import RankBatch, rank_batches
from post_dist.data.public_text import load_public_texts
from post_dist.data.task_reader import TaskReader
from post_dist.errors import InputError, PostDistError
from post_dist.models.adapted import adapted
from post_dist.models.answers import OutputsNotFinite
from post_dist.models.compiled import compile_layers
from post_dist.models.facts import read_facts
from post_dist.models.language_model import LanguageModel
from post_dist.models.load import load_tokenizer, load_whole, model_name, tokenizer_fingerprint
from post_dist.models.sharded import load_sharded
from post_dist.runtime.distributed import World
from post_dist.runtime.precision import choose_precision
from post_dist.runtime.shard_group import layout_of
from post_dist.stages.prompt_origin import check_belongs
from post_dist.stages.prompt_training import train_prompts
from post_dist.stages.transfer.artifact import NamedTarget, Transferred, write_transferred
from post_dist.stages.transfer.builder import (
    ObjectiveBuilder,
    PublicExamples,
    Tokenizers,
    own_reading,
)
from post_dist.stages.transfer.conflicts import (
    LEAST_TEXTS,
    SourcePrompt,
    TransferModels,
    conflicts,
    few_texts,
)
from post_dist.stages.transfer.effect import (
    effect_of_head,
    effect_on_public_text,
    report_effect,
)
from post_dist.stages.transfer.fitted_head import fit_head
from post_dist.stages.transfer.job import (
    TransferJob,
    TransferRequest,
    prepared_job,
    start_on_target,
    trained_together,
)
from post_dist.stages.transfer.objective import ModelPair, TransferObjective
from post_dist.stages.transfer.public_reading import PromptedStates, PublicReading
from post_dist.stages.transfer.step_losses import transfer_losses

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Target:
    """The large LLM that prompts are transferred to.

    Attributes:
        folder: its folder.
        weights: digest of its weights, by which a prompt names it.
    """

    folder: Path
    weights: str


@dataclass(frozen=True)
class DescribedModels:
    """Student and target, without their weights.

    Attributes:
        models: their facts.
        tokenizers: their tokenizers.
    """

    models: TransferModels
    tokenizers: Tokenizers


def describe_models(teacher_folder: Path, student_folder: Path) -> DescribedModels:
    """Read the configurations and tokenizers of student and target, and no weights.

    Args:
        teacher_folder: folder of the target.
        student_folder: folder of the model that the source prompts were tuned on.
    """
    tokenizers = Tokenizers(load_tokenizer(student_folder), load_tokenizer(teacher_folder))
    of_student = tokenizer_fingerprint(tokenizers.student)
    models = TransferModels(
        student=read_facts(student_folder),
        target=read_facts(teacher_folder),
        same_tokenizer=of_student == tokenizer_fingerprint(tokenizers.target),
    )
    return DescribedModels(models, tokenizers)


def check_transfer(
    requests: Sequence[TransferRequest], described: DescribedModels, world: World
) -> None:
    """Refuse prompts of another student, and settings that do not suit the models or the ranks.

    All ranks call it.

    Args:
        requests: the prompts to transfer.
        described: student and target.
        world: the ranks.

    Raises:
        ArtifactRefused: a prompt does not belong to the student.
        InputError: there are conflicts; the message lists all of them. Or a template or label word
            does not suit a tokenizer.
    """
    models = described.models
    # A prompt of another student is not a conflict of settings. It has its own error and exit code.
    for request in requests:
        check_belongs(request.source, models.student, described.tokenizers.student)

    layout = layout_of(requests[0].folder.config.engine, world)
    # Several prompts usually have the same conflicts. Each is listed once.
    found: dict[Conflict, None] = {}
    for request in requests:
        source = request.source
        prompt = SourcePrompt.of(source)
        found |= dict.fromkeys(conflicts(request.folder.config, models, prompt, layout))
    raise_conflicts("transfer", list(found))
    # A label word of two tokens must show before hours of training, and before others wait for it.
    for request in requests:
        public_task = request.folder.config.need_task("public_task")
        task = own_reading(request.source.task, public_task.template)
        for facts, tokenizer in (
            (models.student, described.tokenizers.student),
            (models.target, described.tokenizers.target),
        ):
            TaskReader(task, tokenizer, masked=facts.masked, vocabulary=facts.vocabulary)


def transfer(
    requests: Sequence[TransferRequest],
    large: Target,
    student_folder: Path,
    world: World,
    resume: str,
) -> dict[Path, PostDistError]:
    """Train a prompt for the target for each request, and write it to the request's artifact.

    `check_transfer` comes first. Prompts of the same shape are trained together. They gather the
    target's weights once in each step. A prompt that overflows does not stop the others.

    Args:
        requests: the prompts to transfer. All share teacher, student, public task, engine and seed.
        large: the target.
        student_folder: folder of the model that the source prompts were tuned on.
        world: the ranks.
        resume: `auto` resumes from the newest checkpoint; `never` deletes checkpoints first.

    Returns:
        Why a prompt was not transferred, by the path of its run folder.

    Raises:
        InputError: the public task cannot be used.
        PrivacyRefused: the public task is marked private.
    """
    config = requests[0].folder.config
    public_task = config.need_task("public_task")
    # Read the public texts first, so that mistakes in a file are reported within seconds.
    texts, responses = world.on_main(partial(load_public_texts, public_task, "public_task"))
    wants_head = any(request.folder.config.transfer.adapter == "head" for request in requests)
    if wants_head and len(texts) < LEAST_TEXTS:
        raise_conflicts("transfer", [few_texts(len(texts))])
    tokenizers = Tokenizers(load_tokenizer(student_folder), load_tokenizer(large.folder))
    precision = choose_precision(config.engine, world.device)
    student = load_whole(student_folder, precision, world.device)
    target = load_sharded(large.folder, config.engine, precision, world)
    # The steps of a head read hidden states, and run no layer.
    trains = any(request.folder.config.transfer.adapter != "head" for request in requests)
    if config.engine.compile and trains:
        compile_layers(target)
    models = ModelPair(student, target)

    named = NamedTarget(
        name=model_name(large.folder, config.teacher),
        weights=large.weights,
        tokenizer=tokenizer_fingerprint(tokenizers.target),
    )
    public = PublicExamples(texts, responses, public_task.template)
    builder = ObjectiveBuilder(models, tokenizers, public, world)

    # Fit each head. Prepare each prompt or LoRA: its objective, initial values and optimizer.
    jobs = []
    failed: dict[Path, PostDistError] = {}
    for request in requests:
        source = request.source
        source_nd = source.embeddings.to(world.device)
        section = request.folder.config.transfer
        try:
            objective = builder.build(source.task, source_nd, section, source.adapter)
            if section.adapter == "head":
                start_nd = start_on_target(models, tokenizers, source, section, world)
                made = _with_head(source, objective, start_nd, models.target, builder.states, world)
                _write(request.folder, made, named, world)
            else:
                job = prepared_job(request, objective, models, tokenizers, world, resume)
                jobs.append(job)
        except OutputsNotFinite as error:
            failed[request.folder.path] = error
    builder.states.forget()

    # Train the prompts. Each group is written as soon as it is trained.
    for group in trained_together(jobs):
        failures = _train(group, models, config.seed, world)
        for job, failure in zip(group, failures, strict=True):
            if failure is not None:
                failed[job.run.folder.path] = failure
                continue
            _write(job.run.folder, _trained(job, models.target, world), named, world)
    for path, error in failed.items():
        log.error("%s is not transferred: %s", path.name, error.args[0])
    return failed


def _with_head(
    source: SoftPromptArtifact,
    objective: TransferObjective,
    prompt_nd: torch.Tensor,
    target: LanguageModel,
    states: PromptedStates,
    world: World,
) -> Transferred:
    """Fit a head behind a prompt [n, d] that stays as it is."""
    reading = PublicReading(
        "target", target, objective.reader, objective.examples, objective.section, world
    )
    fitted = fit_head(reading, objective, prompt_nd, states)
    effect = effect_of_head(objective.outputs.target, fitted.scores)
    statistics = {**objective.statistics, **fitted.statistics}
    return Transferred(source, objective, prompt_nd, fitted.head, effect, statistics)


def _trained(job: TransferJob, target: LanguageModel, world: World) -> Transferred:
    """Collect what the training of a prompt or LoRA has made. All ranks call it."""
    prompt_nd = job.prompt_nd.detach()
    effect = effect_on_public_text(target, job.objective, prompt_nd, world, job.lora)
    statistics = job.objective.statistics
    return Transferred(job.source, job.objective, prompt_nd, job.lora, effect, statistics)


def _write(folder: RunFolder, made: Transferred, target: NamedTarget, world: World) -> None:
    """Write the artifact of a transferred prompt, and say what the prompt does."""
    report_effect(folder.path.name, made.effect, made.statistics)
    world.on_main(partial(write_transferred, folder.artifact, made, target))


def _train(
    jobs: Sequence[TransferJob], models: ModelPair, seed: int, world: World
) -> list[InputError | None]:
    """Train the prompts of one group together.

    Returns:
        For each prompt the error that says how it diverged; None if it did not.
    """
    objectives = [job.objective for job in jobs]
    prompts = [job.prompt_nd for job in jobs]

    def losses_at(step: int) -> list[torch.Tensor]:
        # Ranks may have unequal numbers of examples. The weights make the mean over ranks exact.
        own = [_rank_batch(objective, step, seed, world) for objective in objectives]
        losses = transfer_losses(models, objectives, prompts, [batch.rows for batch in own])
        return [batch.weight * loss for batch, loss in zip(own, losses, strict=True)]

    # The backward pass runs a layer again if its activations were not kept, so the LoRA stays until
    # training ends.
    with adapted(models.target, jobs[0].lora):
        return train_prompts([job.run for job in jobs], losses_at, jobs[0].first_step, world)


def _rank_batch(objective: TransferObjective, step: int, seed: int, world: World) -> RankBatch:
    """Return this rank's part of the examples of a step."""
    chosen = objective.batch_at(step, seed)
    # A rank runs its whole part of the batch at once.
    (batch,) = rank_batches(chosen, objective.section.batch_size, world.rank, world.size)
    return batch
