"""`post-dist bench distill`: a step of distillation beside the published distiller, on the run file's corpus.

Shapes: B sequences, T tokens.
"""

import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from post_dist.bench.peers import (
    liger_distillation_loss,
    published_distillation_loss,
    trl_distillation_loss,
)
from post_dist.bench.timing import time_steps
from post_dist.config.precision import Precision
from post_dist.config.schema import RunConfig, Student
from post_dist.data.corpus import Corpus, build_corpus
from post_dist.errors import InputError
from post_dist.files import fingerprint
from post_dist.losses.distillation import Head
from post_dist.models.language_model import LanguageModel
from post_dist.models.load import is_masked, load_config, load_tokenizer, load_whole
from post_dist.models.sharded import load_sharded
from post_dist.models.student import freeze, stand_in_layers, write_student
from post_dist.runtime.distributed import World
from post_dist.stages.distill.signals import Signals, ask_teacher, cache_teacher
from post_dist.stages.distill.stage import Batches, distill_step, student_engine

_STEPS = 10
"""Steps whose batches are cached; `time_steps` takes fewer."""

Step = Callable[[], float]


def bench_distill(config: RunConfig, teacher_folder: Path, world: World) -> dict[str, Any]:
    """Time and memory of a whole step, AdamW's part included, at rate 0: every way sees the same batches and the same student.

    Returns:
        See `time_steps`; and `max_difference`, the largest relative difference of a loss from the published distiller's, in fp32.
    """
    if config.corpus is None or config.student is None:
        raise InputError("bench distill needs the sections `corpus` and `student`")
    if is_masked(load_config(teacher_folder)):
        raise InputError(
            "bench distill compares ways to keep what the teacher says, which a masked one has none of",
            "bench a causal teacher",
        )
    tokenizer = load_tokenizer(teacher_folder)
    num_layers = load_config(teacher_folder).get_text_config().num_hidden_layers
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        (place / "student").mkdir()
        write_student(
            place / "student",
            teacher_folder,
            stand_in_layers(config.student, num_layers),
            tokenizer,
        )
        corpus = build_corpus(config.corpus, tokenizer, place / "corpus.npy", config.seed, world)
        ways = [
            _Ways(config, config.student, precision, teacher_folder, place, corpus, world)
            for precision in ("fp32", "bf16")
        ]
        steps = {
            name: step
            for pair in zip(*(way.steps().items() for way in ways), strict=True)
            for name, step in pair
        }
        first = {name: step() for name, step in steps.items()}
        sizes = {
            "teacher_parameters": _size(ways[0].teacher),
            "student_parameters": _size(ways[0].student()),
        }
        measured = time_steps(
            steps, config.distill.batch_size * config.corpus.sequence_length, "tokens", world.device
        )
    published = next(iter(first.values()))
    apart = [
        abs(loss / published - 1)
        for name, loss in first.items()
        if name.endswith("fp32") and "sampled" not in name
    ]
    return measured | {
        "max_difference": max(apart),
        "settings": sizes | {"vocabulary": ways[0].teacher.vocabulary_size},
    }


class _Ways:
    """The ways to take a step at one precision. Each trains a student of its own, at rate 0, and gives the loss before the step."""

    def __init__(
        self,
        config: RunConfig,
        rule: Student,
        precision: Precision,
        teacher_folder: Path,
        place: Path,
        corpus: Corpus,
        world: World,
    ) -> None:
        self._config = config.model_copy(
            update={
                "distill": config.distill.model_copy(update={"learning_rate": 0.0, "steps": _STEPS})
            }
        )
        self._rule, self._precision, self._place, self._corpus, self._world = (
            rule,
            precision,
            place,
            corpus,
            world,
        )
        self._digest = fingerprint(teacher_folder)
        self.teacher = load_sharded(teacher_folder, config.engine, precision, world)
        self._whole_teacher = load_whole(teacher_folder, precision, world.device)

    def student(self) -> LanguageModel:
        """A fresh student."""
        return load_whole(self._place / "student", self._precision, self._world.device)

    def steps(self) -> dict[str, Step]:
        """By name; those of the peers first."""
        ways = {"published loop": self._peer(published_distillation_loss), "ours": self._ours()}
        if find_spec("trl"):
            ways["TRL's GKD loss"] = self._peer(trl_distillation_loss)
        if find_spec("liger_kernel") and self.teacher.has_linear_head:
            ways["Liger's chunked loss"] = self._peer(liger_distillation_loss)
        ways |= {
            "ours, cached": self._ours(cache="hidden"),
            "ours, sampled cache": self._ours(cache="sampled", alpha_cos=0.0),
        }
        return {f"{name} {self._precision}": step for name, step in ways.items()}

    def _ours(self, **changes: Any) -> Step:
        section = self._config.distill.model_copy(update=changes)
        config = self._config.model_copy(update={"distill": section})
        signals: Signals = ask_teacher(self.teacher, section.layers_in_teacher(self._rule))
        if section.cache != "none":
            how: dict[str, Any] = {"seed": config.seed, "world": self._world}
            signals = cache_teacher(
                self._place, self.teacher, self._digest, self._corpus, section, self._rule, **how
            )
        engine = student_engine(self.student(), config, self._rule, self._precision, self._world)
        batches = Batches(self._corpus, None, signals, section, self._world)
        taken = 0

        def step() -> float:
            nonlocal taken
            terms = distill_step(engine, batches, taken % _STEPS)
            taken += 1
            return float(
                terms
                @ torch.tensor(
                    [section.alpha_ce, section.alpha_lm, section.alpha_cos], device=terms.device
                )
            )

        return step

    def _peer(self, loss_of: Callable[..., torch.Tensor]) -> Step:
        section, student = self._config.distill, self.student()
        freeze(student, self._rule)
        trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0)
        taken = 0

        def step() -> float:
            nonlocal taken
            parts = self._corpus.step_shares(
                taken % _STEPS, section.batch_size, section.micro_batch_size_per_gpu, self._world
            )
            taken += 1
            total = 0.0
            for share in parts:
                input_ids = self._corpus.training(share).to(self._world.device)
                labels = torch.cat(
                    [input_ids[:, 1:], torch.full_like(input_ids[:, :1], -100)], dim=1
                )
                positions = self._corpus.positions(input_ids)
                with torch.no_grad():
                    teacher_BTd = self._whole_teacher(input_ids, position_ids=positions)
                student_BTd = student(input_ids, position_ids=positions)
                loss = loss_of(
                    student_BTd,
                    teacher_BTd,
                    *(_head(model) for model in (student, self._whole_teacher)),
                    labels,
                    section,
                )
                loss = share.weight * loss / len(parts)
                loss.backward()  # type: ignore[no-untyped-call]
                total += float(loss.detach())
            torch.nn.utils.clip_grad_norm_(trained, section.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            return total

        return step


def _head(model: LanguageModel) -> Head:
    return model.head_module if model.has_linear_head else model.head


def _size(model: LanguageModel) -> int:
    return sum(
        int(getattr(parameter, "ds_numel", parameter.numel())) for parameter in model.parameters()
    )
