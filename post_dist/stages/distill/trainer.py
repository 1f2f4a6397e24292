"""Train the student: its optimizer step, and the job that the training loop runs.

Shapes: K terms of the loss.
"""

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from post_dist.config.schema import Distill
from post_dist.data.order import RankBatch
from post_dist.errors import InputError, Interrupted
from post_dist.losses.distillation import TermValues
from post_dist.losses.signals import TeacherSignal
from post_dist.losses.terms import TERMS
from post_dist.runtime.distributed import World
from post_dist.runtime.engine_checkpoint import EngineCheckpoints
from post_dist.runtime.metric_log import MetricRecord
from post_dist.runtime.nonfinite import NonFiniteGuard
from post_dist.runtime.schedule import Schedule, ScheduledRates
from post_dist.runtime.watchdog import phase
from post_dist.stages.distill.batches import DistillationText
from post_dist.stages.distill.signals import SignalSource

log = logging.getLogger(__name__)

_WIDER = {torch.float16: "bf16 or fp32", torch.bfloat16: "fp32"}
"""The precisions of a larger range or of more digits, by that of the student."""

_Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, TeacherSignal]
"""What `DistillationModel` takes: tokens, labels, positions and the teacher's signal."""


class StudentStep:
    """Takes optimizer steps on the student, at the optimizer's current learning rate.

    Args:
        engine: the engine of the student (see `student_engine`).
        text: the training text.
        source: the teacher's signals.
        section: the section `distill` of the run file.
        world: the ranks.
        skipped_steps: number of steps whose text is left out: the first step reads on behind them.
    """

    def __init__(
        self,
        engine: Any,
        text: DistillationText,
        source: SignalSource,
        section: Distill,
        world: World,
        skipped_steps: int = 0,
    ) -> None:
        self.engine = engine
        self.section = section
        self.source = source
        self._text = text
        self._world = world
        self._skipped_steps = skipped_steps
        precision = next(engine.parameters()).dtype
        self._stand_in = _StandIn(world, precision)

    @property
    def skipped(self) -> int:
        """Number of micro-batches so far that were skipped because their loss was not finite."""
        return self._stand_in.guard.skipped

    def take(self, step: int) -> torch.Tensor:
        """Take one step. All ranks call it.

        Args:
            step: number of the step, which fixes the batch.

        Returns:
            The mean of each loss term over the batch, before the step changes the student. Shape
            [K], in the order of `TERMS`.
        """
        sums_K = torch.zeros(len(TERMS), device=self._world.device)
        micro_batches = self._text.corpus.step_batches(
            self._skipped_steps + step,
            self.section.batch_size,
            self.section.micro_batch_size_per_gpu,
            self._world,
        )
        for micro_batch, inputs in self._with_signals(micro_batches, step):
            # The watchdog reports the last phase when a rank hangs.
            phase(f"distill step {step}: the student's forward")
            loss, terms = self._stand_in.forward(self.engine, inputs, step)
            # Micro-batches of ranks may differ in size. The weight makes the mean exact.
            sums_K += micro_batch.weight * terms.stacked()
            phase(f"distill step {step}: the backward pass")
            self.engine.backward(micro_batch.weight * loss)
            # DeepSpeed counts micro-batches, and steps the optimizer after the last one.
            phase(f"distill step {step}: the optimizer")
            self.engine.step()
        return self._world.mean(sums_K) / len(micro_batches)

    def _with_signals(
        self, micro_batches: Sequence[RankBatch], step: int
    ) -> Iterator[tuple[RankBatch, _Inputs]]:
        """Yield each micro-batch with its inputs. The teacher runs over several of them at once.

        All ranks have equally many micro-batches, so they run the teacher equally often.
        """
        at_once = self.section.micro_batches_per_teacher_pass
        for first in range(0, len(micro_batches), at_once):
            served = micro_batches[first : first + at_once]
            phase(f"distill step {step}: the teacher's forward")
            yield from zip(served, self._inputs_of(served), strict=True)

    def _inputs_of(self, micro_batches: Sequence[RankBatch]) -> Iterator[_Inputs]:
        """Run the teacher once, and yield the inputs of each micro-batch."""
        rows = [row for micro_batch in micro_batches for row in micro_batch.rows]
        together = self._text.training(RankBatch(rows, weight=1.0))
        signals = self.source.signals_of(
            together.numbers, together.input_ids_BT, together.positions_BT
        )
        first = 0
        for micro_batch in micro_batches:
            own = slice(first, first + len(micro_batch.rows))
            first = own.stop
            batch = together[own]
            signal = signals
            # A slice would keep the signals of all these micro-batches in memory while the stand-in
            # holds the last good one, thus also during the teacher's next pass.
            if len(micro_batches) > 1:
                signal = signals.map(lambda tensor, own=own: tensor[own].clone())
            yield batch.input_ids_BT, batch.labels_BT, batch.positions_BT, signal


class _StandIn:
    """Replaces a micro-batch whose loss is not finite by the last good one, with weight zero.

    A sharded model needs equally many forward and backward passes on all ranks. If one rank must
    replace its micro-batch, all ranks replace theirs.

    Args:
        world: the ranks.
        precision: precision of the student's weights.
    """

    def __init__(self, world: World, precision: torch.dtype) -> None:
        wider = _WIDER.get(precision)
        self._or_wider = "" if wider is None else f", or set engine.precision to {wider}"
        self._lower = f"lower distill.learning_rate{self._or_wider}"
        self.guard = NonFiniteGuard("distill", self._lower, unit="micro-batches")
        self._world = world
        self._last_good: _Inputs | None = None

    def forward(self, engine: Any, inputs: _Inputs, step: int) -> tuple[torch.Tensor, TermValues]:
        """Compute the loss of a micro-batch and its terms, or those of its replacement.

        Args:
            engine: the engine of the student.
            inputs: the micro-batch.
            step: number of the step, for messages.

        Raises:
            InputError: there is no good micro-batch yet, or five in a row had to be replaced.
        """
        loss, terms, _ = engine(*inputs)
        # One small collective for each micro-batch tells all ranks which losses are not finite.
        is_bad_1 = (~loss.detach().isfinite()).int()[None]
        bad_ranks = self._world.concatenate(is_bad_1).nonzero().flatten().tolist()
        if not bad_ranks:
            self.guard.record(step, finite=True)
            self._last_good = inputs
            return loss, terms

        # The message names the ranks, so a user can look at their hosts and logs.
        where = f"on rank {', '.join(map(str, bad_ranks))}"
        log.warning(
            "distill step %d: the loss is not finite %s: a micro-batch is skipped", step, where
        )
        self.guard.record(step, finite=False, where=f" ({where})")
        if self._last_good is None:
            # A run that resumes has taken steps before its first micro-batch.
            hint = self._lower
            if step == 0:
                hint = f"check that the teacher's weights are finite{self._or_wider}"
            raise InputError(
                f"distill: the loss of the first micro-batch is not finite {where}", hint
            )
        # The weight is 0, so the backward pass runs on all ranks and changes nothing.
        loss, terms, _ = engine(*self._last_good)
        return 0 * loss, terms


class DistillationJob:
    """The training of a student, for `run_training`.

    Args:
        student_step: takes the steps.
        checkpoints: writes the checkpoints.
        metrics: the record of each step's metrics.
        label: name of the training in progress bars and messages.
    """

    def __init__(
        self,
        student_step: StudentStep,
        checkpoints: EngineCheckpoints,
        metrics: MetricRecord,
        label: str,
    ) -> None:
        section = student_step.section
        self.label = label
        self.steps = section.steps
        self._student_step = student_step
        self._checkpoints = checkpoints
        self._optimizer = student_step.engine.optimizer
        schedule = Schedule("linear", section.warmup_share, section.steps)
        self._rates = ScheduledRates(self._optimizer, schedule)
        self._metrics = metrics
        # Whether a step was taken since the last checkpoint.
        self._unsaved = False

    def take_step(self, step: int) -> str:
        """Take one optimizer step and log its metrics. All ranks call it.

        Raises:
            Interrupted: a rank was asked to stop while the step waited for its signals; the steps
                before it are saved.
        """
        try:
            self._student_step.source.prepare(step)
        except Interrupted:
            if self._unsaved:
                self.save(step)
            raise
        # The rate is a function of the step, so a checkpoint needs no schedule.
        self._rates.apply(step)
        # `tolist` copies all terms from the device at once.
        means_K = self._student_step.take(step).tolist()
        self._unsaved = True
        self._checkpoints.settle()
        means = {term.metric: mean for term, mean in zip(TERMS, means_K, strict=True)}
        self._metrics.write(
            step=step,
            **means,
            skipped=self._student_step.skipped,
            learning_rate=self._optimizer.param_groups[0]["lr"],
        )
        return " ".join(f"{metric} {mean:.3f}" for metric, mean in means.items())

    def save(self, step: int) -> None:
        """Begin a checkpoint from which step number `step` is the next one. All ranks call it."""
        self._checkpoints.begin(step)
        self._unsaved = False
