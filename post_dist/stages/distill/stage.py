"""Stage 1, run by the provider: distill the large LLM into a student for data owners."""

import logging
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from post_dist.admission.student_config import is_known_family
from post_dist.artifacts.card import write_card
from post_dist.artifacts.manifest import write_artifact
from post_dist.artifacts.run_folder import RunFolder
from post_dist.config.precision import Precision
from post_dist.config.schema import RunConfig
from post_dist.conflicts import raise_conflicts
from post_dist.data.corpus import PackedCorpus
from post_dist.errors import EnvironmentFault, InputError
from post_dist.files import write_folder
from post_dist.models.facts import read_facts
from post_dist.models.load import (
    load_tokenizer,
    load_whole,
    read_config,
    tokenizer_fingerprint,
)
from post_dist.models.student import check_cut, write_student
from post_dist.runtime.checkpoint import is_whole, seal, sealed_digests
from post_dist.runtime.distributed import World
from post_dist.runtime.engine_checkpoint import engine_checkpoints, engine_start
from post_dist.runtime.local_copies import LocalCopies
from post_dist.runtime.progress import progress
from post_dist.runtime.shard_group import layout_of
from post_dist.runtime.trackers import open_public_metrics
from post_dist.runtime.training import EverySteps, run_training
from post_dist.runtime.watchdog import phase
from post_dist.runtime.zero import full_weights, number_of_parameters
from post_dist.stages.distill.cached_teacher import CachedTeacher, signal_worker
from post_dist.stages.distill.conflicts import conflicts, required_sections, token_conflicts
from post_dist.stages.distill.given_away import given_away, perplexities
from post_dist.stages.distill.held_out import held_out_metrics
from post_dist.stages.distill.layer_choice import choose_layers
from post_dist.stages.distill.model import student_engine
from post_dist.stages.distill.online_teacher import OnlineTeacher
from post_dist.stages.distill.signal_maker import SignalMaker
from post_dist.stages.distill.signals import SignalSource
from post_dist.stages.distill.teacher import LoadedTeacher, load_teacher
from post_dist.stages.distill.trainer import DistillationJob, StudentStep

log = logging.getLogger(__name__)


def check_distillation(config: RunConfig, teacher_folder: Path, world: World) -> None:
    """Refuse a run file that does not suit the teacher or the ranks. All ranks call it.

    It reads the teacher's configuration and tokenizer, and no weights.

    Raises:
        InputError: there are conflicts; the message lists all of them.
    """
    layout = layout_of(config.engine, world)
    facts = read_facts(teacher_folder)
    found = conflicts(config, facts, layout)
    found += token_conflicts(load_tokenizer(teacher_folder), facts)
    raise_conflicts("distill", found)
    family = read_config(teacher_folder).model_type
    if not is_known_family(family):
        log.warning(
            "owners' checks know no family %s: they refuse this student, unless they trust it "
            "unchecked",
            family,
        )


def distill(
    folder: RunFolder, teacher_folder: Path, teacher_digest: str, world: World, resume: str
) -> None:
    """Train a student and write it to `folder.artifact`. All ranks call it.

    `check_distillation` comes first. The artifact's manifest also gets the metrics of the held-out
    split.

    Args:
        folder: the run folder.
        teacher_folder: the large LLM in Hugging Face format.
        teacher_digest: digest of its files.
        world: the ranks.
        resume: `auto` resumes from the newest checkpoint; `never` deletes checkpoints first.

    Raises:
        InputError: the corpus cannot be used, or training diverges.
        EnvironmentFault: the written student differs from the trained one.
        Interrupted: a rank was asked to stop; the state is saved.
    """
    config = folder.config
    _, student_section = required_sections(config)
    section = config.distill
    copies = LocalCopies(_copies_folder(folder), world.rank)
    begun = engine_start(folder.checkpoints, resume, world, copies)

    corpus, teacher = load_teacher(config, teacher_folder, teacher_digest, world)
    model = teacher.model
    precision = teacher.precision

    # Choose layers, and make the student from them.
    untrained = _write_untrained(folder, teacher, corpus, world, resumes=begun.step > 0)
    student = load_whole(untrained, precision, world.device)
    layers = student.model.config.post_dist_layers
    check_cut(model, student, layers)
    engine = student_engine(student, config, student_section, precision, world)
    begun.restore(engine)

    # Train. With a cache, steps read files of signals, which other workers may be writing.
    text = teacher.reads(corpus, config, world.device)
    online = OnlineTeacher(model, section.layers_in_teacher(student_section))
    with ExitStack() as opened:
        source: SignalSource = online
        if section.cache != "none":
            maker = SignalMaker(model, section, student_section, config.seed)
            worker = opened.enter_context(
                signal_worker(folder.path, teacher_digest, config.engine, maker, corpus, world)
            )
            source = CachedTeacher(worker, corpus, world.device)
        student_step = StudentStep(engine, text, source, section, world)
        checkpoints = opened.enter_context(
            engine_checkpoints(folder.checkpoints, engine, world, copies)
        )
        metrics = open_public_metrics(folder, world)
        job = DistillationJob(student_step, checkpoints, metrics, "distill")
        run_training(job, begun.step, world, EverySteps(section.checkpoint_every_steps))
    # The last checkpoint is complete, so no restart needs signals.
    source.finish()

    # Evaluate the student on the held-out split, which a cache does not cover.
    held_out = held_out_metrics(engine, online, text, section.micro_batch_size_per_gpu, world)
    log.info("held out: %s", ", ".join(f"{name} {value:.4g}" for name, value in held_out.items()))

    # Gather the trained weights on rank 0, which writes the artifact.
    trained = full_weights(student, world)
    settings = {
        "layers": layers,
        "num_teacher_layers": len(model.layers),
        "student": student_section.model_dump(mode="json"),
        "distill": section.model_dump(mode="json"),
        "held_out": held_out,
        "perplexity": perplexities(held_out, {}),
    }

    # Rank 0 loads a second copy of the student, which also holds the weights that were not trained.
    def write() -> None:
        whole = load_whole(untrained, precision, torch.device("cpu")).model
        # The names begin with `model.`, the attribute of `LanguageModel` with the transformers
        # model. The frozen lower block is missing, because it ran in the teacher.
        weights = {name.removeprefix("model."): tensor for name, tensor in trained.items()}
        settings["given_away"] = given_away(whole, weights, number_of_parameters(model))
        whole.load_state_dict(weights, strict=False)
        _write_artifact(folder.artifact, teacher, whole, precision, settings)

    world.on_main(write)
    copies.clear()


def write_signals(
    folder: RunFolder, teacher_folder: Path, teacher_digest: str, world: World
) -> tuple[Path, int]:
    """Write the signals that `distill` will read, beside other workers. All ranks call it.

    Args:
        folder: the run folder of the student; `distill.cache` is not `none`.
        teacher_folder: the large LLM in Hugging Face format.
        teacher_digest: digest of its files.
        world: the ranks of this worker.

    Returns:
        The folder of their files, and the number of files.

    Raises:
        InputError: the corpus cannot be used, or `distill.cache` is `none`.
        EnvironmentFault: the disk is full.
        Interrupted: a rank was asked to stop; complete files are kept.
    """
    config = folder.config
    _, student_section = required_sections(config)
    # Otherwise the workers would take hours to write files that nothing reads.
    if config.distill.cache == "none":
        raise InputError("distill.cache is none, so distill reads no signals", "set it to hidden")
    corpus, teacher = load_teacher(config, teacher_folder, teacher_digest, world)
    maker = SignalMaker(teacher.model, config.distill, student_section, config.seed)
    with (
        signal_worker(folder.path, teacher_digest, config.engine, maker, corpus, world) as worker,
        progress("teacher signals", worker.missing, show=world.is_main) as advance,
    ):
        # With a limit, a finished student would be awaited forever.
        if config.distill.cache_gib is None or not folder.finished:
            worker.fill(worker.count, advance)
    return worker.files.folder, worker.count


def _copies_folder(folder: RunFolder) -> Path | None:
    """Return the folder of a run's second copies on each node, or None if it keeps none."""
    place = folder.config.engine.local_checkpoint_folder
    return place and place / folder.path.parent.name / folder.path.name


def _write_untrained(
    folder: RunFolder, teacher: LoadedTeacher, corpus: PackedCorpus, world: World, *, resumes: bool
) -> Path:
    """Write the untrained student unless an earlier start has written it, and return its folder.

    Raises:
        InputError: it was damaged, and now differs from the one that the checkpoints belong to.
    """
    untrained = folder.checkpoints / "untrained"
    if world.on_main(lambda: is_whole(untrained)):
        return untrained
    _, student_section = required_sections(folder.config)
    # Layers are chosen once. A resumed run keeps them, because its checkpoints need these layers.
    micro_batch_size = folder.config.distill.micro_batch_size_per_gpu
    layers = choose_layers(student_section, teacher.model, corpus, micro_batch_size, world)

    def fill(unfinished: Path) -> None:
        write_student(unfinished, teacher.folder, layers, teacher.tokenizer)
        seal(unfinished)

    def write() -> None:
        before = sealed_digests(untrained)
        if untrained.exists():
            log.warning("%s is damaged: it is made again from the teacher", untrained)
            shutil.rmtree(untrained)
        write_folder(untrained, fill)
        if resumes and before not in (None, sealed_digests(untrained)):
            raise InputError(
                f"{untrained} was damaged, and the teacher now gives another student",
                "start again with --resume never",
            )

    world.on_main(write)
    return untrained


def _write_artifact(
    artifact: Path,
    teacher: LoadedTeacher,
    student: PreTrainedModel,
    precision: Precision,
    settings: dict[str, Any],
) -> None:
    """Write the student with its card and manifest, and read it back before it gets its name."""

    def fill(partial: Path) -> None:
        phase("writing the student")
        student.save_pretrained(partial)
        teacher.tokenizer.save_pretrained(partial)
        _write_student_card(partial, settings)
        phase("hashing the student")

    def check(partial: Path) -> None:
        _check_reads_back(partial, precision, student.state_dict())

    write_artifact(
        artifact,
        "student",
        fill,
        parents={"teacher": teacher.digest},
        config=settings,
        tokenizer=tokenizer_fingerprint(teacher.tokenizer),
        check=check,
    )


def _write_student_card(folder: Path, settings: dict[str, Any]) -> None:
    layers = settings["layers"]
    counts = settings["given_away"]
    copied = 100 * counts["student_parameters"] / counts["teacher_parameters"]
    unchanged = 100 * counts["unchanged_parameters"] / counts["teacher_parameters"]
    summary = (
        f"A student of {len(layers)} of {settings['num_teacher_layers']} layers "
        f"(numbers {layers}), distilled on public text. It was copied from {copied:.1f}% of the "
        f"teacher's parameters, and {unchanged:.1f}% are still equal to the teacher's. "
        "`post-dist verify` also prints what attacks on it have reached, if its provider has tried."
    )
    write_card(
        folder,
        "Student for private soft-prompt tuning",
        summary,
        settings["held_out"] | counts | {"perplexity": settings["perplexity"]},
        library="transformers",
    )


def _check_reads_back(
    artifact: Path, precision: Precision, weights: dict[str, torch.Tensor]
) -> None:
    """Load a written student as its user will, and compare every weight.

    Raises:
        InputError: a trained weight is not finite.
        EnvironmentFault: a weight differs from the trained one.
    """
    phase("reading the student back")
    # The student is loaded on the CPU, because the GPU still holds the teacher.
    loaded = load_whole(artifact, precision, torch.device("cpu")).model.state_dict()
    for name, tensor in sorted(weights.items()):
        # NaN differs from itself, so this comes before the comparison.
        if not bool(tensor.isfinite().all()):
            raise InputError(
                f"distill: the trained weight {name} holds values that are not finite",
                "lower distill.learning_rate",
            )
        if name not in loaded or not torch.equal(loaded[name], tensor):
            raise EnvironmentFault(
                f"{artifact} does not read back as it was written: {name} differs",
                "check the disk",
            )
