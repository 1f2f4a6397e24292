"""`post-dist bench transfer`: a step of the transfer beside the published loop, on the run file's public rows.

Shapes: B rows, n prompt tokens, d width, V vocabulary.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from post_dist.artifacts.task import PromptTask
from post_dist.bench.peers import cached_transfer_step, published_transfer_step
from post_dist.bench.timing import time_steps
from post_dist.config.precision import Precision
from post_dist.config.schema import Engine, RunConfig
from post_dist.data.public_text import load_public_texts
from post_dist.data.template import Batch
from post_dist.errors import InputError
from post_dist.models.load import load_tokenizer, load_whole
from post_dist.models.prompt_init import prompt_from_text
from post_dist.models.sharded import load_sharded
from post_dist.runtime.distributed import World
from post_dist.stages.transfer.objective import Lesson, Models, lesson_losses, prepare_lesson

MOST_ROWS = 256
"""Public rows that the benchmark draws its batches from."""


def bench_transfer(config: RunConfig, teacher: Path, student: Path, world: World) -> dict[str, Any]:
    """Time and memory of a whole step with Adam, under the published loss on the whole vocabulary.

    Every way sees the same batches of `transfer.batch_size` public rows, in the same order. The published loop pads to `max_length`.

    Returns:
        See `time_steps`; `max_difference`, the largest relative difference of loss and gradient from the published loop's, at equal
        precision fp32; and `once`, what is computed before the first step.
    """
    if config.public_task is None:
        raise InputError("bench transfer needs the section `public_task`")
    alpha = 0.5 if config.transfer.alpha == "auto" else config.transfer.alpha
    settings = {
        "objective": "published",
        "scores": "vocabulary",
        "match_class_shares": False,
        "alpha": alpha,
    }
    section = config.transfer.model_copy(update=settings)
    texts = load_public_texts(config.public_task, "public_task")[0][:MOST_ROWS]
    tokenizer = load_tokenizer(teacher)
    task = PromptTask(
        config.public_task.template or "{text}",
        (),
        config.public_task.max_length,
        False,
        config.tune.init_text,
    )
    steps: dict[str, Callable[[], tuple[torch.Tensor, torch.Tensor]]] = {}
    once: dict[str, float] = {}
    for precision in ("fp32", "bf16"):
        models = Models(
            load_whole(student, precision, world.device),
            load_sharded(teacher, Engine(), precision, world),
        )
        source_nd = prompt_from_text(
            models.target, tokenizer, task.init_text, config.tune.num_virtual_tokens
        )
        noise_nd = torch.randn(
            source_nd.shape, generator=torch.Generator().manual_seed(config.seed)
        ).to(source_nd.device)
        source_nd = source_nd + 0.1 * source_nd.std() * noise_nd
        start = time.perf_counter()
        lesson = prepare_lesson(
            task,
            source_nd,
            config.public_task,
            (texts, []),
            models,
            section,
            (tokenizer, tokenizer),
            world,
            {},
        )
        once[precision] = time.perf_counter() - start
        whole = Models(models.student, load_whole(teacher, precision, world.device))
        steps |= _ways(lesson, models, whole, source_nd, precision, config, world)
    order = (
        "published loop fp32",
        "published loop bf16",
        "ours fp32",
        "ours bf16",
        "cached, plain torch fp32",
        "cached, plain torch bf16",
    )
    steps = {name: steps[name] for name in order}
    first = {name: step() for name, step in steps.items()}
    differences = [
        float((mine - published).norm() / published.norm())
        for name in order
        if name.endswith("fp32")
        for mine, published in zip(first[name], first[order[0]], strict=True)
    ]
    shape = {
        "rows": section.batch_size,
        "num_virtual_tokens": config.tune.num_virtual_tokens,
        "max_length": task.max_length,
        "mean_tokens": sum(len(row.token_ids) for row in lesson.rows) / len(lesson.rows),
    }
    measured = time_steps(steps, section.batch_size, "samples", world.device)
    facts = {
        "rows": len(texts),
        **{f"seconds_{precision}": seconds for precision, seconds in once.items()},
    }
    return measured | {"max_difference": max(differences), "once": facts, "settings": shape}


def _ways(
    lesson: Lesson,
    models: Models,
    whole: Models,
    source_nd: torch.Tensor,
    precision: Precision,
    config: RunConfig,
    world: World,
) -> dict[str, Callable[[], tuple[torch.Tensor, torch.Tensor]]]:
    """Steps by name; each gives the loss and the gradient, and leaves the prompt where it was: Adam runs at rate 0."""

    def collated(rows: list[int], length: int = 0) -> Batch:
        return lesson.template.collate([lesson.rows[row] for row in rows], length).to(world.device)

    def published(rows: list[int], prompt_nd: torch.Tensor) -> torch.Tensor:
        padded = collated(rows, lesson.template.max_length)
        return published_transfer_step(
            whole.student, whole.target, padded, source_nd, prompt_nd, lesson.section
        )

    def cached(rows: list[int], prompt_nd: torch.Tensor) -> torch.Tensor:
        return cached_transfer_step(
            whole.target,
            collated(rows),
            [kept[rows] for kept in constants],
            prompt_nd,
            lesson.section,
        )

    def ours(rows: list[int], prompt_nd: torch.Tensor) -> torch.Tensor:
        return lesson_losses(models, [lesson], [prompt_nd], [rows], world.device)[0]

    with torch.no_grad():
        heads = (whole.student, whole.student, whole.target)
        kept = (lesson.source, lesson.source_prompted, lesson.target)
        constants = [
            model.head(hidden.to(world.device)) for model, hidden in zip(heads, kept, strict=True)
        ]

    def step_of(
        loss_of: Callable[[list[int], torch.Tensor], torch.Tensor],
    ) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
        prompt_nd = source_nd.clone().requires_grad_(True)
        optimizer = torch.optim.Adam([prompt_nd], lr=0.0)
        taken = 0

        def step() -> tuple[torch.Tensor, torch.Tensor]:
            nonlocal taken
            rows = lesson.rows_at(taken, config.seed)
            taken += 1
            optimizer.zero_grad()
            loss = loss_of(rows, prompt_nd)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            return loss.detach(), prompt_nd.grad.detach().clone()  # type: ignore[union-attr]

        return step

    ways = {"published loop": published, "ours": ours, "cached, plain torch": cached}
    return {f"{name} {precision}": step_of(loss_of) for name, loss_of in ways.items()}
