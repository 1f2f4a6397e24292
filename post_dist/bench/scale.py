"""`post-dist bench scale`: a step of distill and of transfer on the ranks that a launcher has started, by part and by rank.

Shapes: W ranks, S steps, K collectives of a step.
"""

import json
import shutil
import socket
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist

from post_dist.artifacts.task import PromptTask
from post_dist.bench.collectives import KINDS, CollectiveTimer
from post_dist.bench.timing import device_name, peak_memory_mib, seconds_of, wait_for, watch_memory
from post_dist.bench.transfer import MAX_EXAMPLES
from post_dist.config.precision import Precision
from post_dist.config.schema import RunConfig, Student
from post_dist.data.corpus import Corpus, build_corpus
from post_dist.data.order import RankBatch, rank_batches
from post_dist.data.public_text import load_public_texts
from post_dist.errors import InputError
from post_dist.files import write_folder, writing
from post_dist.models.load import load_config, load_tokenizer, load_whole
from post_dist.models.prompt_init import prompt_from_text
from post_dist.models.sharded import load_sharded
from post_dist.models.student import stand_in_layers, write_student
from post_dist.planning.scaling import grown
from post_dist.runtime.distributed import World
from post_dist.runtime.precision import choose_precision
from post_dist.stages.distill.batches import DistillationText, masking_for
from post_dist.stages.distill.model import student_engine
from post_dist.stages.distill.online_teacher import OnlineTeacher
from post_dist.stages.distill.trainer import StudentStep
from post_dist.stages.transfer.builder import ObjectiveBuilder, PublicExamples, Tokenizers
from post_dist.stages.transfer.objective import ModelPair
from post_dist.stages.transfer.step_losses import transfer_losses

_WARM_UP = 2
STEPS = 5
_STRAGGLES = 1.15
"""A rank that computes so many times as long as the median rank is named."""
_PARTS = ("compute", "wait", *KINDS)
"""Of a step; what goes in is measured beside it."""


@dataclass(frozen=True)
class Work:
    """What is measured.

    Attributes:
        stage: distill or transfer.
        batch_size: over all ranks.
        unit: of the amount, tokens or samples.
        amount: how much one step handles.
        step: takes a step, by its number.
        inputs: makes what this rank's step reads, and nothing else.
        end: gives back what an engine holds on to.
    """

    stage: str
    batch_size: int
    unit: str
    amount: int
    step: Callable[[int], object]
    inputs: Callable[[int], object]
    end: Callable[[], object] = lambda: None


def bench_scale(config: RunConfig, teacher_folder: Path, world: World) -> dict[str, Any]:
    """Measure; all ranks call it.

    With the run file's batch (strong scaling), and with as many times that as there are ranks (weak). Steps are timed as they are; then
    as many with every collective waited for, which shows where a rank's time goes, and takes longer where they ran beside computation.

    Returns:
        What was measured on, and `rows`, one for each stage and scaling: `step_seconds`, the median of the slowest rank's, and its middle
        half; the amount per second; `received_bytes` of this rank by kind; the `straggler`, or None; and `per_rank` the seconds of
        `compute`, `input`, `gather` and `reduce` (what the wires take), `control`, and `wait` (for other ranks), and the peak of memory
        above what was held without the models.

    Raises:
        InputError: a section is missing, or the run file's output cannot be written to.
    """
    precision = choose_precision(config.engine, world.device)
    hosts: list[str] = [""] * world.size
    dist.all_gather_object(hosts, socket.gethostname())
    rows = []
    with _cut_student(config, teacher_folder, world) as (student_folder, corpus):
        before = watch_memory(world.device)
        works = _Works(config, teacher_folder, student_folder, corpus, precision, world)
        of_teacher = watch_memory(world.device) - before
        # Stage by stage: DeepSpeed gathers ahead what the pass before used, and the transfer's uses the head.
        for make in (works.distill, works.transfer):
            for scaling, times in (("strong", 1), ("weak", world.size))[: min(2, world.size)]:
                before = watch_memory(world.device) - of_teacher
                work = make(grown(config, times))
                rows.append({"scaling": scaling} | _measured(work, before, hosts, world))
                work.end()
    return {
        "device": device_name(world.device),
        "ranks": world.size,
        "hosts": len(set(hosts)),
        "precision": precision,
        "zero_stage": config.engine.zero_stage,
        "shard_group": config.engine.shard_group,
        "rows": rows,
    }


def write_scale(path: Path, measured: dict[str, Any]) -> None:
    """Keep what `bench_scale` gave, for `post-dist report`."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(measured, indent=1) + "\n")


@contextmanager
def _cut_student(
    config: RunConfig, teacher_folder: Path, world: World
) -> Iterator[tuple[Path, Corpus]]:
    """An untrained student, which costs as much as a trained one, and the corpus; in a folder that all ranks see, for a while."""
    if config.corpus is None or config.student is None or config.public_task is None:
        raise InputError("bench scale needs the sections `corpus`, `student` and `public_task`")
    tokenizer, rule = load_tokenizer(teacher_folder), config.student
    layers = stand_in_layers(rule, load_config(teacher_folder).get_text_config().num_hidden_layers)
    made: list[str] = []

    def make() -> None:
        with writing(config.output):
            config.output.mkdir(parents=True, exist_ok=True)
            made.append(tempfile.mkdtemp(prefix="bench-scale-", dir=config.output))

    world.on_main(make)
    place = Path(world.from_main("".join(made)))
    try:
        student = place / "student"
        world.on_main(
            lambda: write_folder(
                student, lambda partial: write_student(partial, teacher_folder, layers, tokenizer)
            )
        )
        yield (
            student,
            build_corpus(config.corpus, tokenizer, place / "corpus.npy", config.seed, world),
        )
        world.barrier()
    finally:
        if world.is_main:
            shutil.rmtree(place)


class _Works:
    """The two stages' steps over one teacher."""

    def __init__(
        self,
        config: RunConfig,
        teacher_folder: Path,
        student_folder: Path,
        corpus: Corpus,
        precision: Precision,
        world: World,
    ) -> None:
        self._student_folder, self._corpus, self._precision, self._world = (
            student_folder,
            corpus,
            precision,
            world,
        )
        self._tokenizer = load_tokenizer(teacher_folder)
        self._teacher = load_sharded(teacher_folder, config.engine, precision, world)
        self._masking = masking_for(self._teacher, self._tokenizer, config)

    def distill(self, config: RunConfig) -> Work:
        """A step of the optimizer on the student, the teacher asked in it."""
        section, rule, world = config.distill, cast(Student, config.student), self._world
        student = load_whole(self._student_folder, self._precision, world.device)
        engine = student_engine(student, config, rule, self._precision, world)
        text = DistillationText(self._corpus, self._masking, world.device)
        source = OnlineTeacher(self._teacher, section.layers_in_teacher(rule))
        student_step = StudentStep(engine, text, source, section, world)

        def inputs(step: int) -> None:
            for share in self._corpus.step_batches(
                step, section.batch_size, section.micro_batch_size_per_gpu, world
            ):
                self._corpus.training(share).to(world.device)

        amount = section.batch_size * config.corpus.sequence_length  # type: ignore[union-attr]
        return Work(
            "distill",
            section.batch_size,
            "tokens",
            amount,
            student_step.take,
            inputs,
            engine.destroy,
        )

    def transfer(self, config: RunConfig) -> Work:
        """A prompt's gradient over all ranks. What is kept of the public rows is made once, and not measured."""
        private, public, section, world = (
            config.private_task,
            config.public_task,
            config.transfer,
            self._world,
        )
        if private is None or public is None:
            raise InputError(
                "bench scale needs the sections `private_task`, for its label words alone, and `public_task`"
            )
        words = tuple(private.labels.values())
        text = private.template or public.template or "{text}"
        task = PromptTask(
            text, words, private.max_length, private.allow_multi_token, config.tune.init_text
        )
        texts = load_public_texts(public, "public_task")[0][:MAX_EXAMPLES]
        models = ModelPair(
            load_whole(self._student_folder, self._precision, world.device), self._teacher
        )
        start_nd = prompt_from_text(
            self._teacher, self._tokenizer, task.init_text, config.tune.num_virtual_tokens
        ).float()
        tokenizers = Tokenizers(self._tokenizer, self._tokenizer)
        examples = PublicExamples(texts, [], public.template)
        builder = ObjectiveBuilder(models, tokenizers, examples, world)
        objective = builder.build(task, start_nd, section)
        prompt_nd = start_nd.to(world.device).requires_grad_(True)

        def own(step: int) -> RankBatch:
            return rank_batches(
                objective.batch_at(step, config.seed), section.batch_size, world.rank, world.size
            )[0]

        def step_of(step: int) -> None:
            share = own(step)
            (loss,) = transfer_losses(models, [objective], [prompt_nd], [share.rows])
            (share.weight * loss).backward()
            world.mean(prompt_nd.grad)  # type: ignore[arg-type]
            prompt_nd.grad = None

        def inputs(step: int) -> None:
            examples = [objective.examples[index] for index in own(step).rows]
            objective.reader.collate(examples).to(world.device)

        return Work("transfer", section.batch_size, "samples", section.batch_size, step_of, inputs)


def _measured(work: Work, before_mib: float, hosts: list[str], world: World) -> dict[str, Any]:
    """One row."""
    for step in range(_WARM_UP):
        work.step(step)
    watch_memory(world.device)
    steps = range(STEPS)
    plain_S = [_seconds(work.step, step, world) for step in steps]
    peak_mib = peak_memory_mib(world.device) - before_mib
    input_seconds = statistics.median(_seconds(work.inputs, step, world) for step in steps)
    split = [_split(work.step, step, input_seconds, world) for step in steps]
    slowest_S = _of_all(plain_S, world).amax(dim=0).tolist()
    parts_WP = torch.stack([parts_WP for parts_WP, _ in split]).median(dim=0).values
    of_ranks_W2 = _of_all([input_seconds, peak_mib / 1024], world)
    low, median, high = statistics.quantiles(slowest_S, n=4)
    compute_W = parts_WP[:, _PARTS.index("compute")]
    slowest = int(compute_W.argmax())
    straggles = float(compute_W[slowest]) > _STRAGGLES * float(compute_W.median())
    return {
        "stage": work.stage,
        "batch_size": work.batch_size,
        "step_seconds": median,
        "interval": [low, high],
        f"{work.unit}_per_second": work.amount / median,
        "received_bytes": split[-1][1],
        "straggler": f"rank {slowest} on {hosts[slowest]}" if straggles else None,
        "per_rank": [
            {
                "rank": rank,
                "host": hosts[rank],
                "peak_memory_gib": peak,
                "input": input_,
                **dict(zip(_PARTS, parts, strict=True)),
            }
            for rank, (parts, (input_, peak)) in enumerate(
                zip(parts_WP.tolist(), of_ranks_W2.tolist(), strict=True)
            )
        ],
    }


def _split(
    take: Callable[[int], object], step: int, input_seconds: float, world: World
) -> tuple[torch.Tensor, dict[str, float]]:
    """Where the time of a step goes on each rank, [W, P] by `_PARTS`, and the bytes that came to this rank by kind.

    The rank that comes last to a collective waits for nobody: the least time of all ranks is what the wires take.
    """
    with CollectiveTimer(world.device) as wires:
        seconds = _seconds(take, step, world)
    calls_WK = _of_all([call.seconds for call in wires.calls], world)
    own_W = _of_all([seconds - input_seconds], world)[:, 0] - calls_WK.sum(dim=1)
    least_K = calls_WK.amin(dim=0)
    parts = {"compute": own_W.clamp(min=0), "wait": (calls_WK - least_K).sum(dim=1)}
    for kind in KINDS:
        of_kind_K = torch.tensor([call.kind == kind for call in wires.calls], dtype=torch.float64)
        parts[kind] = (least_K * of_kind_K).sum().expand(world.size)
    return torch.stack([parts[name] for name in _PARTS], dim=1), {
        kind: wires.bytes_of(kind) for kind in KINDS
    }


def _of_all(values: list[float], world: World) -> torch.Tensor:
    """Every rank's values, a row each."""
    return world.concatenate(torch.tensor([values], dtype=torch.float64, device=world.device)).cpu()


def _seconds(take: Callable[[int], object], step: int, world: World) -> float:
    """Of a step that all ranks begin together."""
    wait_for(world.device)
    world.barrier()
    return seconds_of(lambda: take(step), world.device)
