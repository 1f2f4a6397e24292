"""Stage 3, the provider's: carry soft prompts from the student to the large LLM, with public text alone.

Nothing here can reach private data: the stage is handed no private section, and reads no label column.
Shapes: n prompt tokens, d width.
"""

from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from post_dist.artifacts.card import write_card
from post_dist.artifacts.prompt import (
    PromptContents,
    Provenance,
    SoftPromptArtifact,
    read_prompt,
    write_prompt,
)
from post_dist.artifacts.run_folder import RunFolder
from post_dist.config.schema import Teacher, Transfer
from post_dist.config.sources import Task
from post_dist.data.order import rank_batches
from post_dist.data.public_text import load_public_texts
from post_dist.errors import ArtifactRefused, InputError
from post_dist.models.language_model import LanguageModel
from post_dist.models.load import load_tokenizer, load_whole, tokenizer_fingerprint
from post_dist.models.prompt_init import prompt_from_text
from post_dist.models.sharded import load_sharded
from post_dist.runtime.distributed import World
from post_dist.runtime.optimizers import make_optimizer
from post_dist.runtime.precision import choose_precision
from post_dist.runtime.trackers import open_public_metrics
from post_dist.stages.prompt_training import PromptRun, train_prompts
from post_dist.stages.transfer.objective import Lesson, Models, lesson_losses, prepare_lesson


@dataclass(frozen=True)
class Client:
    """One soft prompt to be carried over: its folder, the run's, and what the run's settings are."""

    folder: RunFolder
    prompt_folder: Path


def transfer(
    clients: Sequence[Client], teacher_folder: Path, student_folder: Path, world: World, resume: str
) -> None:
    """Train a prompt for the target for each client, and leave it in its `folder.artifact`.

    Prompts of one shape are trained beside each other, which costs one gathering of the target's weights for all of them.

    Args:
        clients: they share teacher, student, public task, engine and seed.
        teacher_folder: the target.
        student_folder: the model that the source prompts were tuned on.
        world: the ranks.
        resume: auto or never.

    Raises:
        ArtifactRefused: a prompt fails its checks, or does not belong to these models.
        PrivacyRefused: the public task is marked private.
    """
    config = clients[0].folder.config
    if config.public_task is None:
        raise InputError("transfer needs the section `public_task`")
    public = world.on_main(partial(load_public_texts, config.public_task, "public_task"))
    prompts = [read_prompt(client.prompt_folder) for client in clients]
    precision = choose_precision(config.engine, world.device)
    models = Models(
        load_whole(student_folder, precision, world.device),
        load_sharded(teacher_folder, config.engine, precision, world),
    )
    tokenizers = load_tokenizer(student_folder), load_tokenizer(teacher_folder)
    for client, prompt in zip(clients, prompts, strict=True):
        check_belongs(prompt, models.student, models.target, tokenizers[0])
        _check_comparable(client.folder.config.transfer, models, tokenizers)
        if prompt.task.max_response_length:
            _check_generates(client.folder.config.transfer, config.public_task)

    pupils: dict[tuple[int, ...], list[_Pupil]] = {}
    said: dict[Hashable, torch.Tensor] = {}
    for client, prompt in zip(clients, prompts, strict=True):
        section = client.folder.config.transfer
        source_nd = prompt.embeddings.to(world.device)
        lesson = prepare_lesson(
            prompt.task,
            source_nd,
            config.public_task,
            public,
            models,
            section,
            tokenizers,
            world,
            said,
        )
        text_nd = prompt_from_text(
            models.target, tokenizers[1], prompt.task.init_text, len(source_nd)
        )
        start_nd = (
            torch.lerp(text_nd, source_nd, section.trained_share)
            if section.trained_share
            else text_nd
        )
        start_nd = start_nd.to(world.device, torch.float32).clone()
        optimizer = make_optimizer("adam", [{"params": [start_nd], "lr": section.learning_rate}])
        run = PromptRun(
            [start_nd],
            optimizer,
            section,
            client.folder,
            open_metrics=open_public_metrics,
            show_loss=True,
        )
        alike = (
            len(start_nd),
            prompt.task.max_response_length,
            section.steps,
            section.batch_size,
            run.take_up(resume, world),
        )
        pupils.setdefault(alike, []).append(_Pupil(prompt, lesson, run))

    for (*_, batch_size, first_step), group in pupils.items():
        for start in range(0, len(group), config.transfer.prompts_at_once):
            beside = group[start : start + config.transfer.prompts_at_once]
            _train(beside, models, batch_size, first_step, config.seed, world)
            for pupil in beside:
                world.on_main(
                    partial(
                        _write,
                        pupil,
                        config.teacher,
                        teacher_folder,
                        tokenizer_fingerprint(tokenizers[1]),
                    )
                )


@dataclass(frozen=True)
class _Pupil:
    source: SoftPromptArtifact
    lesson: Lesson
    run: PromptRun


def _train(
    pupils: Sequence[_Pupil],
    models: Models,
    batch_size: int,
    first_step: int,
    seed: int,
    world: World,
) -> None:
    lessons = [pupil.lesson for pupil in pupils]

    def losses_at(step: int) -> list[torch.Tensor]:
        own = [
            rank_batches(lesson.rows_at(step, seed), batch_size, world.rank, world.size)[0]
            for lesson in lessons
        ]
        losses = lesson_losses(
            models,
            lessons,
            [pupil.run.parameters[0] for pupil in pupils],
            [share.rows for share in own],
            world.device,
        )
        return [share.weight * loss for share, loss in zip(own, losses, strict=True)]

    train_prompts([pupil.run for pupil in pupils], losses_at, first_step, world)


def _write(pupil: _Pupil, teacher: Teacher | None, teacher_folder: Path, tokenizer: str) -> None:
    source, section, folder = pupil.source, pupil.lesson.section, pupil.run.folder
    # What the biases of the source prompt do is in the loss, and so in the new prompt.
    task = replace(source.task, class_biases=())
    name = teacher.path if teacher and not Path(teacher.path).is_absolute() else teacher_folder.name

    def card(artifact: Path) -> None:
        summary = "A soft prompt that was transferred from a student with public text alone (POST)."
        epsilon = (
            "none: the source prompt is not private" if source.epsilon is None else source.epsilon
        )
        write_card(
            artifact,
            f"Soft prompt for {name}",
            summary,
            section.model_dump() | {"epsilon": epsilon},
            library="peft",
            tag="prompt-tuning",
        )

    contents = PromptContents(pupil.run.parameters[0], task, source.privacy)
    lineage = {"source prompt": source.manifest.digest, **source.manifest.parents}
    settings = {
        "transfer": section.model_dump(mode="json"),
        "task": asdict(task),
        "public_text": dict(pupil.lesson.signals),
    }
    provenance = Provenance(model_name=name, tokenizer=tokenizer, parents=lineage, config=settings)
    write_prompt(folder.artifact, contents, provenance, card)


def check_belongs(
    prompt: SoftPromptArtifact,
    student: LanguageModel,
    target: LanguageModel | None,
    student_tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Check that a prompt is the student's, and that student and target, if there is one, answer in the same way.

    Raises:
        ArtifactRefused: widths or tokenizers of prompt and student differ, or one model is causal and the other masked.
    """
    width = prompt.embeddings.shape[1]
    if student.width != width:
        raise ArtifactRefused(
            f"the prompt has vectors of width {width}, the student of width {student.width}"
        )
    if target and student.masked != target.masked:
        raise ArtifactRefused("student and target are not both causal or both masked models")
    if tokenizer_fingerprint(student_tokenizer) != prompt.manifest.tokenizer:
        raise ArtifactRefused(
            "the student's tokenizer is not the one that the prompt was tuned with"
        )


def _check_comparable(
    section: Transfer,
    models: Models,
    tokenizers: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase],
) -> None:
    """Check that what the settings compare can be compared, for a student that was not cut from the target.

    Raises:
        InputError: the prompt cannot start from vectors of another width; logits of two vocabularies have nothing in common.
    """
    one, other = models.student.width, models.target.width
    if one != other and section.trained_share:
        raise InputError(
            f"transfer.trained_share is {section.trained_share:g}, but vectors of width {one} do not fit a target of width {other}",
            "set transfer.trained_share: 0, so that the prompt starts from text",
        )
    if section.scores == "vocabulary" and tokenizer_fingerprint(
        tokenizers[0]
    ) != tokenizer_fingerprint(tokenizers[1]):
        raise InputError(
            "transfer.scores: vocabulary compares logits token by token, and student and target have different tokenizers",
            "set transfer.scores: classes; the label words then connect them",
        )


def _check_generates(section: Transfer, public_task: Task) -> None:
    """Check that a prompt which generates text can learn from the public rows.

    Raises:
        InputError: they have no responses, or classes are to be compared.
    """
    if public_task.response_column is None:
        hint = "set public_task.response_column; the loss is taken where each of its tokens is predicted"
        raise InputError(
            "the prompt generates text, and the public task has no responses to learn from", hint
        )
    if section.scores == "classes" or section.alpha == "auto":
        wrong = "scores: classes" if section.scores == "classes" else "alpha: auto"
        raise InputError(
            f"transfer.{wrong} is for tasks with classes, and the prompt generates text",
            "set scores: vocabulary and a number",
        )
