"""What an owner gains who distills the student further, in the hope to get the large LLM.

A copy of the finished student is trained on the text behind that of its own training, with all of
its layers and the outputs of the teacher itself. An owner has no such outputs.
"""

import copy
import json
import logging
import shutil
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from post_dist.artifacts.manifest import (
    FILE_NAME,
    PERPLEXITY,
    SIGNATURE,
    read_manifest,
    write_manifest,
)
from post_dist.artifacts.run_folder import RunFolder
from post_dist.artifacts.strict_json import read_number
from post_dist.config.schema import RunConfig
from post_dist.errors import InputError
from post_dist.files import write_file, write_folder
from post_dist.models.load import load_whole
from post_dist.models.student import write_student
from post_dist.runtime.distributed import World
from post_dist.runtime.engine_checkpoint import engine_checkpoints, engine_start
from post_dist.runtime.local_copies import LocalCopies
from post_dist.runtime.metric_log import MetricRecord, MetricValue
from post_dist.runtime.trackers import open_public_metrics
from post_dist.runtime.training import EverySteps, run_training
from post_dist.stages.distill.attack_config import attack_config
from post_dist.stages.distill.batches import DistillationText
from post_dist.stages.distill.conflicts import required_sections
from post_dist.stages.distill.given_away import perplexities
from post_dist.stages.distill.held_out import held_out_metrics
from post_dist.stages.distill.model import student_engine
from post_dist.stages.distill.online_teacher import OnlineTeacher
from post_dist.stages.distill.teacher import LoadedTeacher, load_teacher
from post_dist.stages.distill.trainer import DistillationJob, StudentStep

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Attacked:
    """The models and the text of an attack.

    Attributes:
        student: folder of the finished student.
        steps: number of steps that it was trained for.
        teacher: the teacher.
        teacher_head: the teacher's head; None if the student's own is equal to it.
        text: the public text.
    """

    student: Path
    steps: int
    teacher: LoadedTeacher
    teacher_head: nn.Module | None
    text: DistillationText


def attack(
    folder: RunFolder,
    student: Path,
    teacher_folder: Path,
    teacher_digest: str,
    world: World,
    resume: str,
) -> None:
    """Attack a finished student, and write it once more, with a manifest that tells of the attacks.

    All ranks call it. There is one attack for each number in `distill.attack_tokens`. An
    interrupted one resumes from its checkpoint.

    Args:
        folder: the run folder, with the settings of `attack_config.attacks_config`.
        student: the student's artifact. It is not changed.
        teacher_folder: the large LLM in Hugging Face format.
        teacher_digest: digest of its files.
        world: the ranks.
        resume: `auto` resumes from the newest checkpoint; `never` deletes what earlier starts left.

    Raises:
        InputError: the corpus cannot be used, training diverges, or the student is too old.
        EnvironmentFault: the disk is full.
        Interrupted: a rank was asked to stop; the state is saved.
    """
    # Rank 0 reads the student's files for all ranks.
    made = world.on_main(lambda: _settings_of(student))
    if resume == "never":
        world.on_main(partial(shutil.rmtree, folder.checkpoints, ignore_errors=True))
    config = folder.config
    corpus, teacher = load_teacher(config, teacher_folder, teacher_digest, world)
    text = teacher.reads(corpus, config, world.device)
    head = _teacher_head(folder, tuple(made["layers"]), teacher, world)
    attacked = _Attacked(student, made["distill"]["steps"], teacher, head, text)
    # The steps of all attacks are counted on, as those of one run.
    metrics = open_public_metrics(folder, world)
    first = 0
    losses = {}
    for tokens in config.distill.attack_tokens:
        own = attack_config(config, tokens)
        place = folder.checkpoints / f"attack-{tokens}"
        losses[tokens] = _loss(own, place, attacked, _LaterSteps(metrics, first), world)
        log.info("after %d more tokens: lm %.4g on held-out text", tokens, losses[tokens])
        first += own.distill.steps
    world.on_main(lambda: _write(folder.artifact, student, losses))


def _settings_of(student: Path) -> dict[str, Any]:
    """Return how a student was made.

    Raises:
        InputError: it was made by a version that did not say enough.
    """
    made = dict(read_manifest(student, "student").config)
    if "teacher_lm" not in made.get("held_out", {}):
        raise InputError(
            f"{student} was made by an older version, which did not evaluate the teacher",
            "distill it again, or leave distill.attack_tokens out",
        )
    return made


def _teacher_head(
    folder: RunFolder, layers: tuple[int, ...], teacher: LoadedTeacher, world: World
) -> nn.Module | None:
    """Return the teacher's head if the student's own was trained.

    Args:
        folder: the run folder.
        layers: the teacher's layers in the student.
        teacher: the teacher.
        world: the ranks, which all call this function.
    """
    _, student_section = required_sections(folder.config)
    if student_section.freeze_head:
        return None
    # An untrained student has it. The teacher's own may be in shards.
    untrained = folder.checkpoints / "untrained"

    def write() -> None:
        if not untrained.exists():
            write_folder(
                untrained,
                lambda place: write_student(place, teacher.folder, layers, teacher.tokenizer),
            )

    world.on_main(write)
    head = load_whole(untrained, teacher.precision, world.device).head_module
    return copy.deepcopy(head).requires_grad_(False)


def _loss(
    config: RunConfig, place: Path, attacked: _Attacked, metrics: MetricRecord, world: World
) -> float:
    """Return the language-modeling loss that an attack reaches on held-out text, in nats.

    Args:
        config: the settings of this attack.
        place: folder of its checkpoints. The result is kept beside it.
        attacked: the models and the text.
        metrics: the record of its steps.
        world: the ranks.
    """
    result = place.with_suffix(".json")
    # Rank 0 decides for all ranks, because other nodes may see the file later.
    found = world.on_main(lambda: _kept_loss(result))
    if found is not None:
        return found
    loss = _attacked_loss(config, place, attacked, metrics, world)

    def keep() -> None:
        write_file(result, lambda unfinished: unfinished.write_text(json.dumps(loss)))
        # An attack that is over does not resume.
        shutil.rmtree(place, ignore_errors=True)

    world.on_main(keep)
    return loss


def _kept_loss(result: Path) -> float | None:
    """Return the loss of an attack that is over; None if it has to be made, or made again."""
    try:
        return read_number(result)
    except (OSError, ValueError):
        return None


def _attacked_loss(
    config: RunConfig, place: Path, attacked: _Attacked, metrics: MetricRecord, world: World
) -> float:
    """Distill a copy of the student further, and return its language-modeling loss."""
    _, student_section = required_sections(config)
    section = config.distill
    precision = attacked.teacher.precision
    # An attack can be repeated at little cost, so its checkpoints have no second copies.
    copies = LocalCopies(None, world.rank)
    begun = engine_start(place, "auto", world, copies)
    student = load_whole(attacked.student, precision, world.device)
    engine = student_engine(
        student, config, student_section, precision, world, attacked.teacher_head
    )
    begun.restore(engine)
    # No layer is frozen, so the teacher runs none of the student's.
    teacher = OnlineTeacher(attacked.teacher.model, 0)
    student_step = StudentStep(engine, attacked.text, teacher, section, world, attacked.steps)
    with engine_checkpoints(place, engine, world, copies) as checkpoints:
        job = DistillationJob(student_step, checkpoints, metrics, "attack")
        run_training(job, begun.step, world, EverySteps(section.checkpoint_every_steps))
    size = section.micro_batch_size_per_gpu
    loss = held_out_metrics(engine, teacher, attacked.text, size, world)["lm"]
    # The next attack needs the memory.
    engine.destroy()
    return loss


def _write(artifact: Path, student: Path, losses: dict[int, float]) -> None:
    """Write the student with a manifest that tells of the attacks.

    All else stays as it is. So it has the digest that it had, and whatever was made with it still
    belongs to it.
    """
    manifest = read_manifest(student, "student")
    reached = perplexities(manifest.config["held_out"], losses)
    attacked = replace(manifest, config=manifest.config | {PERPLEXITY: reached})

    def fill(place: Path) -> None:
        # A signature is that of the old manifest.
        others = shutil.ignore_patterns(FILE_NAME, SIGNATURE)
        shutil.copytree(student, place, ignore=others, dirs_exist_ok=True)
        write_manifest(place, attacked)
        # The copies have the hashes of the old files.
        read_manifest(place, "student")

    write_folder(artifact, fill)


class _LaterSteps:
    """Adds a number to the step of all metrics."""

    def __init__(self, metrics: MetricRecord, first: int) -> None:
        self._metrics = metrics
        self._first = first

    def write(self, step: int, **values: MetricValue) -> None:
        """Add the metrics of one step."""
        self._metrics.write(self._first + step, **values)
