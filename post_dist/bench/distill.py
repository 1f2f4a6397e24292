"""`post-dist bench distill`: a distillation step beside other implementations.

Shapes: B sequences, T tokens, d width, K terms of the loss.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch

from post_dist.bench.peers.distillation import (
    liger_distillation_loss,
    published_distillation_loss,
    trl_distillation_loss,
)
from post_dist.bench.timing import Measure, time_steps
from post_dist.config.precision import Precision
from post_dist.config.schema import RunConfig
from post_dist.conflicts import raise_conflicts
from post_dist.data.corpus import PackedCorpus, build_corpus
from post_dist.data.masking import next_token_labels
from post_dist.data.order import RankBatch
from post_dist.files import fingerprint
from post_dist.losses.heads import Head
from post_dist.losses.terms import TERMS, hidden_terms_in_use, weights_of
from post_dist.models.compiled import compile_layers
from post_dist.models.facts import read_facts
from post_dist.models.language_model import LanguageModel
from post_dist.models.load import load_tokenizer, load_whole
from post_dist.models.sharded import load_sharded
from post_dist.models.student import freeze, stand_in_layers, write_student
from post_dist.runtime.distributed import World
from post_dist.runtime.shard_group import layout_of
from post_dist.runtime.zero import number_of_parameters
from post_dist.stages.distill.batches import DistillationText
from post_dist.stages.distill.cached_teacher import CachedTeacher, signal_worker
from post_dist.stages.distill.conflicts import conflicts, required_sections
from post_dist.stages.distill.model import student_engine
from post_dist.stages.distill.online_teacher import OnlineTeacher
from post_dist.stages.distill.signal_maker import SignalMaker
from post_dist.stages.distill.signals import SignalSource
from post_dist.stages.distill.trainer import StudentStep

_STEPS = 10
"""Number of steps whose signals are cached. Their batches are repeated after that."""
_PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")
_CACHES: tuple[Literal["none", "hidden", "sampled"], ...] = ("none", "hidden", "sampled")

Step = Callable[[], float]
"""Takes a step and returns the loss before it."""
PeerLoss = Callable[..., torch.Tensor]
"""A loss of `bench/peers/distillation.py`."""


@dataclass(frozen=True)
class _Inputs:
    """The inputs that all ways to take a step share.

    Attributes:
        folder: a temporary folder, with the untrained student in `student`.
        teacher_folder: the teacher in Hugging Face format.
        corpus: the sequences.
        world: the ranks.
    """

    folder: Path
    teacher_folder: Path
    corpus: PackedCorpus
    world: World


def bench_distill(
    config: RunConfig, teacher_folder: Path, world: World, measure: Measure = time_steps
) -> dict[str, Any]:
    """Measure time and memory of a whole step, including AdamW's update.

    The learning rate is 0, so that every way sees the same batches and the same student.

    Args:
        config: the run file.
        teacher_folder: the teacher in Hugging Face format.
        world: the ranks.
        measure: measures the steps.

    Returns:
        The result of `measure`, with `settings` and the sizes of the models. `max_difference` is
        the largest relative difference of an fp32 loss from the published distiller's.

    Raises:
        InputError: a section is missing, or the teacher's signals cannot be cached.
    """
    facts = read_facts(teacher_folder)
    for cache in _CACHES:
        with_cache = _with_cache(config, cache)
        found = conflicts(with_cache, facts, layout_of(config.engine, world))
        raise_conflicts("bench distill", found)
    corpus_section, student_section = required_sections(config)

    tokenizer = load_tokenizer(teacher_folder)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        student_folder = folder / "student"
        student_folder.mkdir()
        layers = stand_in_layers(student_section, facts.layers)
        write_student(student_folder, teacher_folder, layers, tokenizer)
        corpus = build_corpus(corpus_section, tokenizer, folder / "corpora", config.seed, world)
        inputs = _Inputs(folder, teacher_folder, corpus, world)
        # Both precisions are measured in turns, so that a slow minute of the machine slows both.
        ways = [_Ways(config, precision, inputs) for precision in _PRECISIONS]

        steps = _interleaved([way.steps() for way in ways])
        first_losses = {name: step() for name, step in steps.items()}
        sizes = {
            "teacher_parameters": number_of_parameters(ways[0].teacher),
            "student_parameters": number_of_parameters(ways[0].student()),
        }
        tokens = config.distill.batch_size * corpus_section.sequence_length
        measured = measure(steps, tokens, "tokens", world.device)

    return measured | {
        "max_difference": _max_difference(first_losses),
        "settings": sizes | {"vocabulary": facts.vocabulary},
    }


def _with_cache(config: RunConfig, cache: Literal["none", "hidden", "sampled"]) -> RunConfig:
    """Return the run file with a kind of cache, and the number of steps that the cache covers."""
    # A cache without a limit, because the timed steps read the same files many times.
    changes: dict[str, Any] = {"cache": cache, "cache_gib": None}
    changes |= {"steps": _STEPS, "learning_rate": 0.0}
    if cache == "sampled":
        # A cache of samples has no hidden states, so the terms that compare them are left out.
        for term in hidden_terms_in_use(config.distill):
            changes[term.weight_field] = 0.0
    return config.model_copy(update={"distill": config.distill.model_copy(update=changes)})


def _interleaved(steps_of_ways: list[dict[str, Step]]) -> dict[str, Step]:
    """Merge dictionaries entry by entry: the first of each, then the second of each."""
    merged: dict[str, Step] = {}
    for pairs in zip(*(steps.items() for steps in steps_of_ways), strict=True):
        merged.update(pairs)
    return merged


def _max_difference(first_losses: dict[str, float]) -> float:
    """Compare the fp32 losses with the first, which is the published distiller's."""
    published = next(iter(first_losses.values()))
    differences = []
    for name, loss in first_losses.items():
        # Samples equal the other ways only on average.
        if name.endswith("fp32") and "sampled" not in name:
            differences.append(abs(loss / published - 1))
    return max(differences)


class _Ways:
    """The ways to take a step at one precision.

    Each way trains its own student, at a learning rate of 0.

    Args:
        config: the run file.
        precision: precision of all models.
        inputs: the inputs that all ways share.
    """

    def __init__(self, config: RunConfig, precision: Precision, inputs: _Inputs) -> None:
        self._config = _with_cache(config, "none")
        self._precision = precision
        self._inputs = inputs
        _, self._student_section = required_sections(config)
        self._digest = fingerprint(inputs.teacher_folder)
        self.teacher = self._load_teacher()
        self._whole_teacher = load_whole(inputs.teacher_folder, precision, inputs.world.device)

    def student(self) -> LanguageModel:
        """Load an untrained student."""
        return load_whole(
            self._inputs.folder / "student", self._precision, self._inputs.world.device
        )

    def steps(self) -> dict[str, Step]:
        """Return the steps by name, the published distiller's first."""
        ways = {
            "published loop": self._peer(published_distillation_loss),
            "ours": self._ours("none"),
        }
        if find_spec("trl"):
            ways["TRL's GKD loss"] = self._peer(trl_distillation_loss)
        if find_spec("liger_kernel") and self.teacher.has_linear_head:
            ways["Liger's chunked loss"] = self._peer(liger_distillation_loss)
        if self._config.engine.compile:
            compiled_teacher = self._load_teacher()
            compile_layers(compiled_teacher)
            ways["ours, compiled"] = self._ours("none", compiled_teacher)
        ways["ours, cached"] = self._ours("hidden")
        ways["ours, sampled cache"] = self._ours("sampled")
        return {f"{name} {self._precision}": step for name, step in ways.items()}

    def _load_teacher(self) -> LanguageModel:
        """Load the teacher as the distill stage does."""
        inputs = self._inputs
        return load_sharded(
            inputs.teacher_folder, self._config.engine, self._precision, inputs.world
        )

    def _ours(
        self,
        cache: Literal["none", "hidden", "sampled"],
        compiled_teacher: LanguageModel | None = None,
    ) -> Step:
        """Return the step of the distill stage; compiled if its teacher is given compiled."""
        world = self._inputs.world
        corpus = self._inputs.corpus
        engine = self._config.engine.model_copy(update={"compile": compiled_teacher is not None})
        config = _with_cache(self._config, cache).model_copy(update={"engine": engine})
        section = config.distill
        lower_layers = section.layers_in_teacher(self._student_section)
        source: SignalSource = OnlineTeacher(compiled_teacher or self.teacher, lower_layers)
        if cache != "none":
            maker = SignalMaker(self.teacher, section, self._student_section, config.seed)
            # The timed steps read files, and write none.
            run = self._inputs.folder / "run"
            with signal_worker(run, self._digest, config.engine, maker, corpus, world) as worker:
                worker.fill(worker.count)
            source = CachedTeacher(worker, corpus, world.device)
        engine = student_engine(
            self.student(), config, self._student_section, self._precision, world
        )
        text = DistillationText(corpus, None, world.device)
        student_step = StudentStep(engine, text, source, section, world)
        weights = weights_of(section)
        weights_K = torch.tensor([weights[term.metric] for term in TERMS], device=world.device)
        taken = 0

        def step() -> float:
            nonlocal taken
            means_K = student_step.take(taken % _STEPS)
            taken += 1
            return float(means_K @ weights_K)

        return step

    def _peer(self, loss_of: PeerLoss) -> Step:
        """Return the step of a plain loop with a peer's loss."""
        section = self._config.distill
        student = self.student()
        freeze(student, self._student_section)
        trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
        # A learning rate of 0 costs as much as any other, and does not change the student.
        optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0)
        taken = 0

        def step() -> float:
            nonlocal taken
            micro_batches = self._inputs.corpus.step_batches(
                taken % _STEPS,
                section.batch_size,
                section.micro_batch_size_per_gpu,
                self._inputs.world,
            )
            taken += 1
            total = 0.0
            for micro_batch in micro_batches:
                loss = self._peer_loss(loss_of, student, micro_batch)
                loss = micro_batch.weight * loss / len(micro_batches)
                loss.backward()
                total += float(loss.detach())
            torch.nn.utils.clip_grad_norm_(trained, section.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            return total

        return step

    def _peer_loss(
        self, loss_of: PeerLoss, student: LanguageModel, micro_batch: RankBatch
    ) -> torch.Tensor:
        """Compute a peer's loss of a micro-batch."""
        corpus = self._inputs.corpus
        input_ids_BT = corpus.training(micro_batch).to(self._inputs.world.device)
        positions_BT = corpus.positions(input_ids_BT)
        with torch.no_grad():
            teacher_BTd = self._whole_teacher(input_ids_BT, position_ids=positions_BT)
        student_BTd = student(input_ids_BT, position_ids=positions_BT)
        return loss_of(
            student_BTd,
            teacher_BTd,
            _head(student),
            _head(self._whole_teacher),
            next_token_labels(input_ids_BT),
            self._config.distill,
        )


def _head(model: LanguageModel) -> Head:
    """Return the head. A plain matrix is returned as a module, because Liger reads its weight."""
    if model.has_linear_head:
        return model.head_module
    return model.head
