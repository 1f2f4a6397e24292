"""What an owner gains who distills the student further, in the hope to get the large LLM.

A copy of the finished student is trained on more public text, with all of its layers and the
outputs of the teacher itself. An owner has no such outputs, so this is more than an owner can do.
"""

import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from post_dist.artifacts.run_folder import RunFolder
from post_dist.config.precision import Precision
from post_dist.config.schema import RunConfig
from post_dist.files import write_file
from post_dist.models.language_model import LanguageModel
from post_dist.models.load import load_whole
from post_dist.runtime.distributed import World
from post_dist.runtime.engine_checkpoint import engine_checkpoints, engine_start
from post_dist.runtime.local_copies import LocalCopies
from post_dist.runtime.metric_log import MetricLog
from post_dist.runtime.training import EverySteps, run_training
from post_dist.stages.distill.attack_config import attack_config
from post_dist.stages.distill.batches import DistillationText
from post_dist.stages.distill.conflicts import required_sections
from post_dist.stages.distill.held_out import held_out_metrics
from post_dist.stages.distill.model import student_engine
from post_dist.stages.distill.online_teacher import OnlineTeacher
from post_dist.stages.distill.trainer import DistillationJob, StudentStep

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Attacked:
    """The models and the text of an attack.

    Attributes:
        student: folder of the finished student.
        teacher: the teacher, perhaps sharded.
        teacher_head: the teacher's head; None if the student's own is equal to it.
        text: the public text.
        precision: precision of the student.
    """

    student: Path
    teacher: LanguageModel
    teacher_head: nn.Module | None
    text: DistillationText
    precision: Precision


def attacked_losses(folder: RunFolder, attacked: Attacked, world: World) -> dict[int, float]:
    """Attack a finished student with each number of tokens in `distill.attack_tokens`.

    All ranks call it. An interrupted attack resumes from its checkpoint.

    Args:
        folder: the run folder.
        attacked: the models and the text.
        world: the ranks.

    Returns:
        The language-modeling loss in nats on held-out text, by the number of tokens.

    Raises:
        InputError: the training diverges.
        EnvironmentFault: the disk is full.
        Interrupted: a rank was asked to stop; the state is saved.
    """
    losses = {}
    for tokens in folder.config.distill.attack_tokens:
        place = folder.checkpoints / f"attack-{tokens}"
        result = place.with_suffix(".json")
        # Rank 0 decides for all ranks, because other nodes may see the file later.
        found = world.on_main(lambda result=result: _read(result))
        if found is None:
            found = _attacked_loss(attack_config(folder.config, tokens), place, attacked, world)
            world.on_main(lambda result=result, place=place, loss=found: _keep(result, place, loss))
        losses[tokens] = found
        log.info("after %d more tokens of distillation: lm %.4g on held-out text", tokens, found)
    return losses


def _attacked_loss(config: RunConfig, place: Path, attacked: Attacked, world: World) -> float:
    """Distill a copy of the student further, and return its language-modeling loss."""
    _, student_section = required_sections(config)
    section = config.distill
    # An attack may be repeated at little cost, so its checkpoints have no second copies.
    copies = LocalCopies(None, world.rank)
    begun = engine_start(place, "auto", world, copies)
    student = load_whole(attacked.student, attacked.precision, world.device)
    engine = student_engine(
        student, config, student_section, attacked.precision, world, attacked.teacher_head
    )
    begun.restore(engine)
    # No layer is frozen, so the teacher runs none of the student's.
    teacher = OnlineTeacher(attacked.teacher, 0)
    student_step = StudentStep(engine, attacked.text, teacher, section, world)
    with engine_checkpoints(place, engine, world, copies) as checkpoints:
        # The metrics of the run are those of the student itself.
        job = DistillationJob(student_step, checkpoints, MetricLog(None), "attack")
        run_training(job, begun.step, world, EverySteps(section.checkpoint_every_steps))
    size = section.micro_batch_size_per_gpu
    loss = held_out_metrics(engine, teacher, attacked.text, size, world)["lm"]
    # The next attack needs the memory.
    engine.destroy()
    return loss


def _read(result: Path) -> float | None:
    return float(json.loads(result.read_text())) if result.exists() else None


def _keep(result: Path, checkpoints: Path, loss: float) -> None:
    """Write the result of an attack, whose checkpoints are of no use from then on."""
    write_file(result, lambda partial: partial.write_text(json.dumps(loss)))
    shutil.rmtree(checkpoints, ignore_errors=True)
