"""Stage 3, run by the provider: transfer soft prompts from the student to the large LLM.

The stage reads only public text. It gets no private section of the run file, and it reads no label
column.

Shapes: n prompt tokens, d width.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from post_dist.artifacts.card import write_card
from post_dist.artifacts.prompt import (
    PromptContents,
    Provenance,
    SoftPromptArtifact,
    write_prompt,
)
from post_dist.artifacts.run_folder import RunFolder
from post_dist.config.schema import Transfer
from post_dist.conflicts import Conflict, raise_conflicts
from post_dist.data.order import RankBatch, rank_batches
from post_dist.data.public_text import load_public_texts
from post_dist.data.task_reader import TaskReader
from post_dist.errors import InputError, PostDistError
from post_dist.models.answers import OutputsNotFinite
from post_dist.models.facts import read_facts
from post_dist.models.load import load_tokenizer, load_whole, model_name, tokenizer_fingerprint
from post_dist.models.prompt_init import prompt_from_text
from post_dist.models.sharded import load_sharded
from post_dist.runtime.distributed import World
from post_dist.runtime.optimizers import make_optimizer
from post_dist.runtime.precision import choose_precision
from post_dist.runtime.rank_layout import layout_of
from post_dist.runtime.trackers import open_public_metrics
from post_dist.stages.prompt_origin import check_belongs
from post_dist.stages.prompt_training import PromptRun, train_prompts
from post_dist.stages.transfer.builder import (
    ObjectiveBuilder,
    PublicExamples,
    Tokenizers,
    own_reading,
)
from post_dist.stages.transfer.conflicts import SourcePrompt, TransferModels, conflicts
from post_dist.stages.transfer.effect import effect_on_public_text, report_effect
from post_dist.stages.transfer.objective import ModelPair, TransferObjective
from post_dist.stages.transfer.step_losses import transfer_losses

log = logging.getLogger(__name__)


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
class Target:
    """The large LLM that prompts are transferred to.

    Attributes:
        folder: its folder.
        weights: digest of its weights, by which a prompt names it.
    """

    folder: Path
    weights: str


@dataclass(frozen=True)
class TransferJob:
    """One prompt that is trained on the target.

    Attributes:
        source: the prompt that was tuned on the student.
        objective: loss of the new prompt.
        run: the new prompt with its optimizer and its folder.
        first_step: step from which training resumes.
    """

    source: SoftPromptArtifact
    objective: TransferObjective
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


def refuse_transfer(
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

    `refuse_transfer` comes first. Prompts of the same shape are trained together. They gather the
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
    tokenizers = Tokenizers(load_tokenizer(student_folder), load_tokenizer(large.folder))
    precision = choose_precision(config.engine, world.device)
    student = load_whole(student_folder, precision, world.device)
    target = load_sharded(large.folder, config.engine, precision, world)
    models = ModelPair(student, target)

    # Prepare each prompt: its objective, its initial values and its optimizer.
    public = PublicExamples(texts, responses, public_task.template)
    builder = ObjectiveBuilder(models, tokenizers, public, world)
    jobs = []
    failed: dict[Path, PostDistError] = {}
    for request in requests:
        source = request.source
        source_nd = source.embeddings.to(world.device)
        section = request.folder.config.transfer
        try:
            objective = builder.build(source.task, source_nd, section, source.adapter)
        except OutputsNotFinite as error:
            failed[request.folder.path] = error
            continue
        start_nd = _start(models, tokenizers, source, source_nd, section)
        run = _prompt_run(start_nd, request.folder)
        jobs.append(TransferJob(source, objective, run, run.take_up(resume, world)))

    # Train the prompts. Each group is written as soon as it is trained.
    writer = partial(
        _write,
        target=model_name(large.folder, config.teacher),
        weights=large.weights,
        tokenizer=tokenizer_fingerprint(tokenizers.target),
    )
    for group in _groups(jobs, config.transfer.prompts_at_once):
        failures = _train(group, models, config.seed, world)
        for job, failure in zip(group, failures, strict=True):
            if failure is not None:
                failed[job.run.folder.path] = failure
                continue
            trained_nd = job.run.parameters[0].detach()
            effect = effect_on_public_text(models.target, job.objective, trained_nd, world)
            report_effect(job.run.folder.path.name, effect, job.objective.statistics)
            world.on_main(partial(writer, job, effect))
    for path, error in failed.items():
        log.error("%s is not transferred: %s", path.name, error.args[0])
    return failed


def _start(
    models: ModelPair,
    tokenizers: Tokenizers,
    source: SoftPromptArtifact,
    source_nd: torch.Tensor,
    section: Transfer,
) -> torch.Tensor:
    """Compute the initial values [n, d] of the prompt on the target, in fp32.

    `transfer.trained_share` interpolates between the target's embeddings of a text (0) and the
    source prompt (1).
    """
    # A sharded target needs all ranks to gather its embeddings.
    start_nd = prompt_from_text(
        models.target, tokenizers.target, source.task.init_text, len(source_nd)
    )
    # The conflicts allow another width of the source prompt only with a share of 0.
    if section.trained_share:
        start_nd = torch.lerp(start_nd, source_nd, section.trained_share)
    return start_nd.to(source_nd.device, torch.float32).clone()


def _prompt_run(start_nd: torch.Tensor, folder: RunFolder) -> PromptRun:
    """Prepare the training of a prompt. Its losses come from public text, so they are public."""
    # Adam is also the optimizer of the published transfer.
    section = folder.config.transfer
    optimizer = make_optimizer("adam", [{"params": [start_nd], "lr": section.learning_rate}])
    return PromptRun(
        [start_nd],
        optimizer,
        section,
        folder,
        open_metrics=open_public_metrics,
        show_loss=True,
    )


def _groups(jobs: Sequence[TransferJob], at_once: int) -> list[list[TransferJob]]:
    """Divide jobs into groups of one shape, each of at most `at_once` jobs."""
    by_shape: dict[_BatchShape, list[TransferJob]] = {}
    for job in jobs:
        shape = _BatchShape(
            num_virtual_tokens=len(job.source.embeddings),
            max_response_length=job.source.task.max_response_length,
            steps=job.run.section.steps,
            batch_size=job.run.section.batch_size,
            first_step=job.first_step,
        )
        by_shape.setdefault(shape, []).append(job)

    # Each prompt needs memory for its own examples, so the run file limits the size of a group.
    groups = []
    for same_shape in by_shape.values():
        for start in range(0, len(same_shape), at_once):
            groups.append(same_shape[start : start + at_once])
    return groups


def _train(
    jobs: Sequence[TransferJob], models: ModelPair, seed: int, world: World
) -> list[InputError | None]:
    """Train the prompts of one group together.

    Returns:
        For each prompt the error that says how it diverged; None if it did not.
    """
    objectives = [job.objective for job in jobs]
    prompts = [job.run.parameters[0] for job in jobs]

    def losses_at(step: int) -> list[torch.Tensor]:
        # Ranks may have unequal numbers of examples. The weights make the mean over ranks exact.
        own = [_rank_batch(objective, step, seed, world) for objective in objectives]
        losses = transfer_losses(models, objectives, prompts, [batch.rows for batch in own])
        return [batch.weight * loss for batch, loss in zip(own, losses, strict=True)]

    return train_prompts([job.run for job in jobs], losses_at, jobs[0].first_step, world)


def _rank_batch(objective: TransferObjective, step: int, seed: int, world: World) -> RankBatch:
    """Return this rank's part of the examples of a step."""
    chosen = objective.batch_at(step, seed)
    # A rank runs its whole part of the batch at once.
    (batch,) = rank_batches(chosen, objective.section.batch_size, world.rank, world.size)
    return batch


def _write(
    job: TransferJob, effect: Mapping[str, Any], *, target: str, weights: str, tokenizer: str
) -> None:
    """Write the artifact of a trained prompt.

    Args:
        job: the trained prompt.
        effect: its effect on public text.
        target: name of the target.
        weights: digest of the target's weights.
        tokenizer: fingerprint of the target's tokenizer.
    """
    source = job.source
    settings = job.objective.section.model_dump(mode="json")
    # The class biases were part of the loss, so the new prompt has learned their effect.
    task = replace(source.task, class_biases=())

    def write_own_card(artifact: Path) -> None:
        claim: dict[str, Any] = {"epsilon": "none: the source prompt is not private"}
        if source.privacy is not None and source.epsilon is not None:
            # Epsilon means nothing without the other three.
            named = ("epsilon", "delta", "unit", "neighbouring_relation")
            claim = {name: source.privacy[name] for name in named}
        write_card(
            artifact,
            f"Soft prompt for {target}",
            "A soft prompt that was transferred from a student with public text alone (POST).",
            job.objective.section.model_dump() | claim | {"effect on public text": effect},
            library="peft",
            tag="prompt-tuning",
        )

    # The new prompt depends on private data only through the source prompt. By post-processing, the
    # epsilon of the source prompt holds for it too.
    contents = PromptContents(job.run.parameters[0], task, source.privacy)
    # The roles of the sender must not replace those that this stage gives.
    own = {"source prompt": source.manifest.digest, "target": weights}
    provenance = Provenance(
        model_name=target,
        tokenizer=tokenizer,
        parents=source.manifest.parents | own,
        config={
            "transfer": settings,
            "task": asdict(task),
            "public_text": dict(job.objective.statistics),
            "effect_on_public_text": dict(effect),
        },
    )
    write_prompt(job.run.folder.artifact, contents, provenance, write_own_card)
