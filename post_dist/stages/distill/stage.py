"""Stage 1, run by the provider: distill the large LLM into a student for data owners."""

import logging
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from post_dist.artifacts.card import write_card
from post_dist.artifacts.manifest import write_artifact
from post_dist.artifacts.run_folder import RunFolder
from post_dist.config.precision import Precision
from post_dist.config.schema import RunConfig
from post_dist.conflicts import raise_conflicts
from post_dist.data.corpus import Corpus, build_corpus
from post_dist.errors import EnvironmentFault, InputError
from post_dist.files import write_folder
from post_dist.models.facts import read_facts
from post_dist.models.language_model import LanguageModel
from post_dist.models.load import load_tokenizer, load_whole, tokenizer_fingerprint
from post_dist.models.model_checks import check_documents_apart
from post_dist.models.sharded import load_sharded
from post_dist.models.student import check_cut, write_student
from post_dist.runtime.checkpoint import is_whole, seal, sealed_digests
from post_dist.runtime.distributed import World
from post_dist.runtime.engine_checkpoint import EngineStart, engine_checkpoints, engine_start
from post_dist.runtime.local_copies import LocalCopies
from post_dist.runtime.precision import choose_precision
from post_dist.runtime.progress import progress
from post_dist.runtime.rank_layout import layout_of
from post_dist.runtime.trackers import open_public_metrics
from post_dist.runtime.training import EverySteps, run_training
from post_dist.runtime.watchdog import phase
from post_dist.runtime.zero import full_weights, number_of_parameters, shard_share
from post_dist.stages.corpus import corpora_folder
from post_dist.stages.distill.attack import Attacked, attacked_losses
from post_dist.stages.distill.batches import DistillationText, masking_for
from post_dist.stages.distill.cached_teacher import CachedTeacher, signal_worker
from post_dist.stages.distill.conflicts import (
    conflicts,
    epoch_conflicts,
    limit_conflicts,
    required_sections,
)
from post_dist.stages.distill.given_away import given_away, perplexities
from post_dist.stages.distill.held_out import held_out_metrics
from post_dist.stages.distill.layer_choice import choose_layers
from post_dist.stages.distill.model import student_engine
from post_dist.stages.distill.online_teacher import OnlineTeacher
from post_dist.stages.distill.signal_maker import SignalMaker
from post_dist.stages.distill.signals import SignalSource
from post_dist.stages.distill.trainer import DistillationJob, StudentStep

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Teacher:
    """The teacher, its files, its tokenizer, and the precision of both models."""

    folder: Path
    digest: str
    model: LanguageModel
    tokenizer: PreTrainedTokenizerBase
    precision: Precision


@dataclass(frozen=True)
class _Trained:
    """What the training of a student leaves.

    Attributes:
        weights: the student's weights on rank 0, without a frozen lower block, which ran in the
            teacher; empty on other ranks.
        teacher_head: the teacher's head; None if the student's own is equal to it.
        metrics: metrics of the student on the held-out split.
    """

    weights: dict[str, torch.Tensor]
    teacher_head: nn.Module | None
    metrics: dict[str, float]


def refuse_distillation(config: RunConfig, teacher_folder: Path, world: World) -> None:
    """Refuse a run file that does not suit the teacher or the ranks. All ranks call it.

    It reads the teacher's configuration, and no weights.

    Raises:
        InputError: there are conflicts; the message lists all of them.
    """
    layout = layout_of(config.engine, world)
    raise_conflicts("distill", conflicts(config, read_facts(teacher_folder), layout))


def distill(
    folder: RunFolder, teacher_folder: Path, teacher_digest: str, world: World, resume: str
) -> None:
    """Train a student and write it to `folder.artifact`. All ranks call it.

    `refuse_distillation` comes first. The artifact's manifest also gets the metrics of the held-out
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
    copies = LocalCopies(_copies_folder(folder), world.rank)
    begun = engine_start(folder.checkpoints, resume, world, copies)

    corpus, teacher = _load(config, teacher_folder, teacher_digest, world)
    untrained = _write_untrained(folder, teacher, corpus, world, resumes=begun.step > 0)
    masking = masking_for(teacher.model, teacher.tokenizer, config)
    text = DistillationText(corpus, masking, world.device)
    trained = _train(folder, teacher, untrained, text, begun, copies, world)

    # Train copies of the finished student further, to see what an owner would gain.
    attacks: dict[int, float] = {}
    if config.distill.attack_tokens:
        finished = folder.checkpoints / "finished"
        world.on_main(partial(_write_finished, finished, untrained, trained, teacher.precision))
        attacked = Attacked(finished, teacher.model, trained.teacher_head, text, teacher.precision)
        attacks = attacked_losses(folder, attacked, world)

    # Rank 0 writes the artifact.
    world.on_main(partial(_write_artifact, folder, teacher, untrained, trained, attacks))
    copies.clear()


def _train(
    folder: RunFolder,
    teacher: _Teacher,
    untrained: Path,
    text: DistillationText,
    begun: EngineStart,
    copies: LocalCopies,
    world: World,
) -> _Trained:
    """Train a student, and evaluate it. All ranks call it."""
    config = folder.config
    _, student_section = required_sections(config)
    section = config.distill
    model = teacher.model
    # Every rank has a whole student, of which the engine shards what its ZeRO stage says.
    student = load_whole(untrained, teacher.precision, world.device)
    check_cut(model, student, student.model.config.post_dist_layers)
    engine = student_engine(student, config, student_section, teacher.precision, world)
    begun.restore(engine)

    # With a cache, steps read files of signals, which other workers may be writing.
    online = OnlineTeacher(model, section.layers_in_teacher(student_section))
    with ExitStack() as opened:
        source: SignalSource = online
        if section.cache != "none":
            maker = SignalMaker(model, section, student_section, config.seed)
            worker = opened.enter_context(
                signal_worker(folder.path, teacher.digest, maker, text.corpus, world)
            )
            source = CachedTeacher(worker, text.corpus, world.device)
        student_step = StudentStep(engine, text, source, section, world)
        checkpoints = opened.enter_context(
            engine_checkpoints(folder.checkpoints, engine, world, copies)
        )
        metrics = open_public_metrics(folder, world)
        job = DistillationJob(student_step, checkpoints, metrics, "distill")
        run_training(job, begun.step, world, EverySteps(section.checkpoint_every_steps))
    # The last checkpoint is complete, so no restart needs signals.
    source.finish()

    # The held-out split is not in a cache.
    held_out = held_out_metrics(engine, online, text, section.micro_batch_size_per_gpu, world)
    log.info("held out: %s", ", ".join(f"{name} {value:.4g}" for name, value in held_out.items()))
    # The names begin with `model.`, the attribute of `LanguageModel` with the transformers model.
    weights = {
        name.removeprefix("model."): tensor for name, tensor in full_weights(student, world).items()
    }
    trained = _Trained(weights, engine.module.teacher_head, held_out)
    # An attack needs the memory.
    engine.destroy()
    return trained


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
    corpus, teacher = _load(config, teacher_folder, teacher_digest, world)
    maker = SignalMaker(teacher.model, config.distill, student_section, config.seed)
    with (
        signal_worker(folder.path, teacher_digest, maker, corpus, world) as worker,
        progress("teacher signals", worker.missing, show=world.is_main) as advance,
    ):
        # With a limit, a finished student would be awaited forever.
        if config.distill.cache_gib is None or not folder.finished:
            worker.fill(worker.count, advance)
    return worker.files.folder, worker.count


def _load(config: RunConfig, folder: Path, digest: str, world: World) -> tuple[Corpus, _Teacher]:
    """Read the corpus with the teacher's tokenizer, and load the teacher in shards.

    Raises:
        InputError: the corpus cannot be used, or does not suit `distill.cache_gib`.
    """
    corpus_section, _ = required_sections(config)
    tokenizer = load_tokenizer(folder)
    corpora = corpora_folder(config)
    corpus = build_corpus(corpus_section, tokenizer, corpora, config.seed, world)
    precision = choose_precision(config.engine, world.device)
    if config.distill.cache_gib is not None:
        found = epoch_conflicts(config.distill, corpus.num_training_sequences)
        found += limit_conflicts(config, read_facts(folder), precision)
        raise_conflicts("distill", found)
    model = load_sharded(folder, config.engine, precision, world)
    if corpus_section.separate_documents and not model.masked:
        check_documents_apart(model)
    percent = 100 * shard_share(model)
    log.info("teacher: %d layers, this rank holds %.0f%%", len(model.layers), percent)
    return corpus, _Teacher(folder, digest, model, tokenizer, precision)


def _copies_folder(folder: RunFolder) -> Path | None:
    """Return the folder of a run's second copies on each node, or None if it keeps none."""
    place = folder.config.engine.local_checkpoint_folder
    return place and place / folder.path.parent.name / folder.path.name


def _write_untrained(
    folder: RunFolder, teacher: _Teacher, corpus: Corpus, world: World, *, resumes: bool
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


def _write_finished(
    finished: Path, untrained: Path, trained: _Trained, precision: Precision
) -> None:
    """Write the weights of the student for the attacks, unless an earlier start has done so."""
    if finished.exists():
        return
    student = load_whole(untrained, precision, torch.device("cpu")).model
    student.load_state_dict(trained.weights, strict=False)
    write_folder(finished, student.save_pretrained)


def _write_artifact(
    folder: RunFolder,
    teacher: _Teacher,
    untrained: Path,
    trained: _Trained,
    attacks: Mapping[int, float],
) -> None:
    """Write the student with its card and manifest, and read it back before it gets its name."""
    # A second copy of the student, which also holds the weights that were not trained.
    student = load_whole(untrained, teacher.precision, torch.device("cpu")).model
    _, student_section = required_sections(folder.config)
    settings = {
        "layers": student.config.post_dist_layers,
        "num_teacher_layers": len(teacher.model.layers),
        "student": student_section.model_dump(mode="json"),
        "distill": folder.config.distill.model_dump(mode="json"),
        "held_out": trained.metrics,
        "given_away": given_away(student, trained.weights, number_of_parameters(teacher.model)),
        "perplexity": perplexities(trained.metrics, attacks),
    }
    student.load_state_dict(trained.weights, strict=False)

    def fill(partial: Path) -> None:
        phase("writing the student")
        student.save_pretrained(partial)
        teacher.tokenizer.save_pretrained(partial)
        _write_student_card(partial, settings)
        phase("hashing the student")

    def check(partial: Path) -> None:
        _check_reads_back(partial, teacher.precision, student.state_dict())

    write_artifact(
        folder.artifact,
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
        f"teacher's parameters, and {unchanged:.1f}% are still equal to the teacher's."
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
