"""Stage 1, the provider's: distil the large LLM into a student that can be handed out.

Shapes: B sequences, T tokens, d width, N = B T positions.
"""

import copy
import logging
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from post_dist.artifacts.card import write_card
from post_dist.artifacts.manifest import write_artifact
from post_dist.artifacts.run_folder import RunFolder
from post_dist.config.deepspeed import training_settings
from post_dist.config.precision import Precision
from post_dist.config.schema import Distill, RunConfig, Student
from post_dist.conflicts import raise_conflicts
from post_dist.data.corpus import Corpus, build_corpus
from post_dist.data.order import rank_batches
from post_dist.errors import EnvironmentFault, InputError
from post_dist.files import write_folder
from post_dist.losses.distillation import (
    DistillationTerms,
    TeacherSignal,
    distillation_loss,
    logit_pieces,
)
from post_dist.losses.divergence import softened_kl, unexplained_share
from post_dist.models.facts import read_facts
from post_dist.models.language_model import LanguageModel
from post_dist.models.load import load_tokenizer, load_whole, tokenizer_fingerprint
from post_dist.models.model_checks import check_documents_apart
from post_dist.models.lower_block import forward_above, take_out_lower_block
from post_dist.models.sharded import load_sharded
from post_dist.models.student import freeze, least_harmful_layers, listed_layers, write_student
from post_dist.runtime.checkpoint import load_engine, save_engine, start_step
from post_dist.runtime.distributed import World
from post_dist.runtime.optimizers import make_optimizer
from post_dist.runtime.precision import choose_precision
from post_dist.runtime.progress import progress
from post_dist.runtime.schedule import Schedule
from post_dist.runtime.stop import stop_requested, stopped
from post_dist.runtime.trackers import open_public_metrics
from post_dist.runtime.watchdog import phase
from post_dist.runtime.zero import full_weights, gathered, layout_of, shard_share, train_sharded
from post_dist.stages.distill.conflicts import conflicts
from post_dist.stages.distill.signals import Signals, ask_teacher, cache_teacher

log = logging.getLogger(__name__)

_ROWS_FOR_LAYER_CHOICE = 32
_MOST_STAND_INS_IN_A_ROW = 5


def distill(
    folder: RunFolder, teacher_folder: Path, teacher_digest: str, world: World, resume: str
) -> None:
    """Train a student and leave it in `folder.artifact`, with the figures of the held-out text in its manifest."""
    config = folder.config
    section, corpus_section, student_section = config.distill, config.corpus, config.student
    if corpus_section is None or student_section is None:
        raise InputError("distill needs the sections `corpus` and `student`")
    layout = layout_of(config.engine, world)
    raise_conflicts("distill", conflicts(config, read_facts(teacher_folder), layout))
    first_step = start_step(folder.checkpoints, resume, world)
    precision = choose_precision(config.engine, world.device)
    tokenizer = load_tokenizer(teacher_folder)
    teacher = load_sharded(teacher_folder, config.engine, precision, world)
    log.info(
        "teacher: %d layers, this rank holds %.0f%%",
        len(teacher.layers),
        100 * shard_share(teacher),
    )
    if corpus_section.separate_documents and not teacher.masked:
        check_documents_apart(teacher)
    corpus = build_corpus(
        corpus_section, tokenizer, folder.checkpoints / "corpus.npy", config.seed, world
    )
    masking = masking_for(teacher, tokenizer, config)

    untrained = folder.checkpoints / "untrained"
    if not world.on_main(untrained.exists):
        layers = _choose_layers(
            student_section, teacher, corpus, section.micro_batch_size_per_gpu, world
        )
        world.on_main(
            lambda: write_folder(
                untrained, lambda partial: write_student(partial, teacher_folder, layers, tokenizer)
            )
        )
    student = load_whole(untrained, precision, world.device)
    layers = student.model.config.post_dist_layers
    engine = student_engine(student, config, student_section, precision, world)
    if first_step:
        load_engine(folder.checkpoints, first_step, engine)
    asked = signals = ask_teacher(teacher, section.layers_in_teacher(student_section))
    if section.cache != "none":
        place = folder.path.parent
        signals = cache_teacher(
            place,
            teacher,
            teacher_digest,
            corpus,
            section,
            student_section,
            seed=config.seed,
            world=world,
        )
    _train(
        engine,
        Batches(corpus, masking, signals, section, world),
        section,
        folder,
        world,
        first_step,
    )

    figures = _held_out_figures(
        engine, asked, corpus, masking, section.micro_batch_size_per_gpu, world
    )
    log.info("held out: %s", ", ".join(f"{name} {value:.4g}" for name, value in figures.items()))
    trained = {
        name.removeprefix("model."): tensor for name, tensor in full_weights(student, world).items()
    }
    facts = {
        "layers": layers,
        "num_teacher_layers": len(teacher.layers),
        "student": student_section.model_dump(mode="json"),
        "distill": section.model_dump(mode="json"),
        "held_out": figures,
    }

    def write() -> None:
        whole = load_whole(
            untrained, precision, torch.device("cpu")
        ).model  # with the block that ran in the teacher
        whole.load_state_dict(trained, strict=False)

        def fill(artifact: Path) -> None:
            phase("writing the student")
            whole.save_pretrained(artifact)
            tokenizer.save_pretrained(artifact)
            summary = f"A student of {len(layers)} of {len(teacher.layers)} layers (numbers {layers}), distilled on public text."
            write_card(
                artifact,
                "Student for private soft-prompt tuning",
                summary,
                figures,
                library="transformers",
            )
            phase("hashing the student")

        write_artifact(
            folder.artifact,
            "student",
            fill,
            parents={"teacher": teacher_digest},
            config=facts,
            tokenizer=tokenizer_fingerprint(tokenizer),
            check=lambda artifact: _check_reads_back(artifact, precision, whole.state_dict()),
        )

    world.on_main(write)


def _check_reads_back(
    artifact: Path, precision: Precision, weights: dict[str, torch.Tensor]
) -> None:
    """Load a student as its user will, before it gets its name, and compare every weight.

    Raises:
        EnvironmentFault: what is on the disk is not what was trained.
    """
    phase("reading the student back")
    loaded = load_whole(artifact, precision, torch.device("cpu")).model.state_dict()
    differing = [
        name
        for name, tensor in weights.items()
        if name not in loaded or not torch.equal(loaded[name], tensor)
    ]
    if differing or not all(bool(tensor.isfinite().all()) for tensor in weights.values()):
        raise EnvironmentFault(
            f"{artifact} does not read back as it was written: {min(differing, default='not finite')}",
            "check the disk",
        )


def student_engine(
    student: LanguageModel,
    config: RunConfig,
    student_section: Student,
    precision: Precision,
    world: World,
) -> Any:
    """The engine that trains a student as the run file says."""
    section = config.distill
    freeze(student, student_section)
    take_out_lower_block(student, section.layers_in_teacher(student_section))
    if config.engine.activation_checkpointing:
        student.checkpoint_activations()
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    return train_sharded(
        DistillationModel(student, section, head_is_frozen=student_section.freeze_head),
        make_optimizer("adamw", [{"params": trained, "lr": section.learning_rate}]),
        training_settings(
            config.engine,
            precision,
            trained=sum(parameter.numel() for parameter in trained),
            micro_batch_size=section.micro_batch_size_per_gpu,
            accumulation_steps=len(
                rank_batches(
                    range(section.batch_size),
                    section.micro_batch_size_per_gpu,
                    world.rank,
                    world.size,
                )
            ),
            max_grad_norm=section.max_grad_norm,
        ),
    )


class DistillationModel(nn.Module):
    """The student with its loss, so that the logits are made a few positions at a time inside the engine's forward."""

    def __init__(self, student: LanguageModel, section: Distill, *, head_is_frozen: bool) -> None:
        super().__init__()
        self.student = student
        # A frozen head is the teacher's own; a trained one needs the teacher's kept beside it.
        self.teacher_head = (
            None if head_is_frozen else copy.deepcopy(student.head_module).requires_grad_(False)
        )
        self._section = section

    def teacher_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The teacher's logits [..., V] of its last hidden states [..., d]."""
        if self.teacher_head is None:
            return self.student.head(hidden)
        return self.student.capped(self.teacher_head(hidden))

    def forward(
        self,
        input_ids_BT: torch.Tensor,
        labels_BT: torch.Tensor,
        positions_BT: torch.Tensor | None,
        teacher: TeacherSignal,
    ) -> tuple[torch.Tensor, DistillationTerms, torch.Tensor]:
        """The loss, its terms, and the student's last hidden states [B, T, d]."""
        if teacher.below is None:
            hidden_BTd = self.student(input_ids_BT, position_ids=positions_BT)
        else:
            hidden_BTd = forward_above(self.student, teacher.below, positions_BT)
        loss, terms = distillation_loss(
            hidden_BTd.flatten(0, 1),
            teacher.map(lambda tensor: tensor.flatten(0, 1)),
            labels_BT.flatten(),
            self.student.head,
            self.teacher_logits,
            weights=(self._section.alpha_ce, self._section.alpha_lm, self._section.alpha_cos),
            temperature=self._section.temperature,
            # From settings alone, so that ranks with fewer sequences gather a sharded head as often as the others.
            pieces=logit_pieces(
                self._section.micro_batch_size_per_gpu * input_ids_BT.shape[1],
                self.student.vocabulary_size,
            ),
            head_parameters=tuple(
                parameter
                for parameter in self.student.head_module.parameters()
                if parameter.requires_grad
            ),
        )
        return loss, terms, hidden_BTd


class _Masking:
    """Masks a fixed number of tokens in each sequence: 80% become the mask, 10% another token, 10% stay (BERT's rule)."""

    def __init__(self, mask_token: int, vocabulary: int, share: float, seed: int) -> None:
        self._mask_token, self._vocabulary, self._share, self._seed = (
            mask_token,
            vocabulary,
            share,
            seed,
        )

    def __call__(
        self, input_ids_BT: torch.Tensor, places: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Corrupted tokens and labels [B, T]; those of a sequence are a function of the seed and its place in the reading."""
        pairs = [
            self._one(input_ids_T, place)
            for input_ids_T, place in zip(input_ids_BT, places, strict=True)
        ]
        corrupted, labels = zip(*pairs, strict=True)
        return torch.stack(corrupted), torch.stack(labels)

    def _one(self, input_ids_T: torch.Tensor, place: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + place)
        count = max(1, round(self._share * len(input_ids_T)))
        places = torch.rand(input_ids_T.shape, generator=generator).topk(count).indices
        labels = torch.full_like(input_ids_T, -100).scatter(0, places, input_ids_T[places])
        draw = torch.rand(count, generator=generator)
        other = torch.randint(self._vocabulary, (count,), generator=generator)
        kept = input_ids_T[places]
        changed = torch.where(
            draw < 0.8,
            torch.full_like(kept, self._mask_token),
            torch.where(draw < 0.9, other, kept),
        )
        return input_ids_T.scatter(0, places, changed), labels


def masking_for(
    teacher: LanguageModel, tokenizer: PreTrainedTokenizerBase, config: RunConfig
) -> _Masking | None:
    """What a masked teacher's text goes through; a causal one reads it as it is."""
    return (
        _Masking(tokenizer.mask_token_id, len(tokenizer), config.distill.mask_share, config.seed)
        if teacher.masked
        else None
    )


def _train(
    engine: Any,
    batches: "Batches",
    section: Distill,
    folder: RunFolder,
    world: World,
    first_step: int,
) -> None:
    metrics = open_public_metrics(folder, world)
    schedule = Schedule("linear", section.warmup_share, section.steps)
    with progress("distill", section.steps, first_step, show=world.is_main) as advance:
        for step in range(first_step, section.steps):
            for group in engine.optimizer.param_groups:
                group["lr"] = section.learning_rate * schedule.factor(step)
            ce, lm, cos = distill_step(engine, batches, step).tolist()
            rate, skipped = engine.optimizer.param_groups[0]["lr"], batches.stand_in.used
            metrics.write(step=step, ce=ce, lm=lm, cos=cos, skipped=skipped, learning_rate=rate)
            advance(f"ce {ce:.3f} lm {lm:.3f} cos {cos:.3f}")
            stop = stop_requested(world)
            if (
                stop
                or (step + 1) % section.checkpoint_every_steps == 0
                or step + 1 == section.steps
            ):
                save_engine(folder.checkpoints, step + 1, engine, world)
            if stop:
                raise stopped(f"{folder.path.name} is saved at step {step + 1} of {section.steps}")


class Batches:
    """What the steps are made of: the corpus, what the teacher says of it, and who stands in for a spoiled batch."""

    def __init__(
        self,
        corpus: Corpus,
        masking: "_Masking | None",
        signals: Signals,
        section: Distill,
        world: World,
    ) -> None:
        self.corpus, self.masking, self.signals, self.section, self.world = (
            corpus,
            masking,
            signals,
            section,
            world,
        )
        self.stand_in = _StandIn(world)


def distill_step(engine: Any, batches: Batches, step: int) -> torch.Tensor:
    """One step of the optimizer, at the rate that it is set to; the means of the three terms over the batch, before it."""
    section, world = batches.section, batches.world
    sums = torch.zeros(3, device=world.device)
    parts = batches.corpus.step_shares(
        step, section.batch_size, section.micro_batch_size_per_gpu, world
    )
    for share in parts:
        inputs = _inputs(
            batches.corpus, batches.corpus.training(share), batches.masking, share.rows, world
        )
        phase(f"distill step {step}: the teacher's forward")
        signal = batches.signals(batches.corpus.numbers(share), inputs[0], inputs[2])
        phase(f"distill step {step}: the student's forward")
        loss, terms = batches.stand_in.forward(engine, (*inputs, signal), step)
        sums += share.weight * torch.stack([terms.ce, terms.lm, terms.cos])
        phase(f"distill step {step}: the backward pass")
        engine.backward(share.weight * loss)
        phase(f"distill step {step}: the optimizer")
        engine.step()
    return world.mean(sums) / len(parts)


_Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
"""What the models read, the label of each position, and positions where documents are kept apart; [B, T] each."""
_Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, TeacherSignal]


class _StandIn:
    """Takes the place of a micro-batch whose loss is not finite on some rank: the last sound one, with weight zero.

    All ranks do so together, because a sharded model needs equal forwards and backwards on each.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._sound: _Batch | None = None
        self._in_a_row = 0
        self.used = 0
        """How often it was needed so far."""

    def forward(
        self, engine: Any, batch: _Batch, step: int
    ) -> tuple[torch.Tensor, DistillationTerms]:
        """The loss of a micro-batch and its terms, or those of its stand-in.

        Raises:
            InputError: there is none yet, or five were needed in a row.
        """
        loss, terms, _ = engine(*batch)
        spoiled = (
            self._world.concatenate((~loss.detach().isfinite()).int()[None])
            .nonzero()
            .flatten()
            .tolist()
        )
        if not spoiled:
            self._sound, self._in_a_row = batch, 0
            return loss, terms
        self.used += 1
        self._in_a_row += 1
        log.warning(
            "distill step %d: the loss is not finite on rank %s: a micro-batch is passed over",
            step,
            ", ".join(map(str, spoiled)),
        )
        if self._sound is None or self._in_a_row >= _MOST_STAND_INS_IN_A_ROW:
            raise InputError(
                f"distill: the loss was not finite on rank {spoiled[0]} at step {step}, {self._in_a_row} times in a row",
                "lower distill.learning_rate, or take engine.precision: bf16 or fp32",
            )
        loss, terms, _ = engine(*self._sound)
        return 0 * loss, terms


def _inputs(
    corpus: Corpus,
    sequences_BT: torch.Tensor,
    masking: _Masking | None,
    places: list[int],
    world: World,
) -> _Inputs:
    if masking is None:
        labels = torch.cat([sequences_BT[:, 1:], torch.full_like(sequences_BT[:, :1], -100)], dim=1)
        input_ids = sequences_BT.to(world.device)
        return input_ids, labels.to(world.device), corpus.positions(input_ids)
    input_ids, labels = masking(sequences_BT, places)
    return input_ids.to(world.device), labels.to(world.device), None


@torch.no_grad()
def _held_out_figures(
    engine: Any,
    signals: Signals,
    corpus: Corpus,
    masking: _Masking | None,
    batch_size: int,
    world: World,
) -> dict[str, float]:
    """Means over the held-out text, and the last position: how far the student's answer is, and what it misses.

    Neither a low KL nor a low unexplained share predicts transfer (docs/method.md); they tell how distillation went.
    """
    model: DistillationModel = engine.module
    terms, last = [], []
    for share in corpus.held_out_shares(batch_size, world):
        inputs = _inputs(
            corpus, corpus.held_out(share), masking, [-1 - number for number in share.rows], world
        )
        signal, labels = signals(share.rows, inputs[0], inputs[2]), inputs[1]
        _, batch, student_hidden = engine(*inputs, signal)
        terms.append(share.weight * torch.stack([batch.ce, batch.lm, batch.cos]))
        place = (
            (labels != -100).int().argmax(dim=1)
            if masking
            else torch.full((len(labels),), labels.shape[1] - 1, device=labels.device)
        )
        rows = torch.arange(share.counted, device=labels.device)
        pair = student_hidden, cast(torch.Tensor, signal.hidden)
        last.append(torch.stack([hidden[rows, place[: share.counted]] for hidden in pair]).float())
    ce, lm, cos = world.mean(torch.stack(terms).mean(dim=0)).tolist()
    student_last, teacher_last = (world.concatenate(part) for part in torch.cat(last, dim=1))
    dtype = next(model.parameters()).dtype
    with gathered(model):
        last_kl = softened_kl(
            model.teacher_logits(teacher_last.to(dtype)),
            model.student.head(student_last.to(dtype)),
            temperature=1.0,
        )
    return {
        "ce": ce,
        "lm": lm,
        "cos": cos,
        "last_position_kl_nats": float(last_kl),
        "unexplained_share": unexplained_share(student_last, teacher_last),
    }


def _choose_layers(
    section: Student, teacher: LanguageModel, corpus: Corpus, at_most: int, world: World
) -> tuple[int, ...]:
    if section.layers != "auto":
        layers = listed_layers(section, len(teacher.layers))
        log.info(
            "student: layers %s (%s)",
            list(layers),
            section.layers if isinstance(section.layers, str) else "listed",
        )
        return layers
    num_layers = int(section.num_layers or 0)
    sample = [
        (corpus.training(share).to(world.device), share.weight)
        for share in corpus.step_shares(0, _ROWS_FOR_LAYER_CHOICE, at_most, world)
    ]
    layers = least_harmful_layers(teacher, sample, num_layers, section.frozen_lower_layers, world)
    log.info("student: layers %s, those whose removal hurts the last position most", list(layers))
    return layers
