"""`post-dist bench tune`: a private step beside the ordinary one, on random tokens: no private row is read.

Shapes: B rows, n prompt tokens, d width.
"""

import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from post_dist.bench.peers import OpacusHooks, plain_losses
from post_dist.bench.timing import measure
from post_dist.config.schema import RunConfig
from post_dist.conflicts import raise_conflicts
from post_dist.data.template import Batch
from post_dist.data.verbalizer import Verbalizer
from post_dist.errors import InputError
from post_dist.models.classifier import PromptInput, class_losses
from post_dist.models.load import load_tokenizer, load_whole
from post_dist.models.prompt_init import prompt_from_text
from post_dist.privacy.gradients import ExampleGradients
from post_dist.privacy.mechanism import PrivateOptimizer
from post_dist.privacy.plan import PrivacyPlan
from post_dist.privacy.randomness import RandomSource
from post_dist.runtime.distributed import World
from post_dist.runtime.precision import choose_precision
from post_dist.stages.room import room_conflicts

_PLAN = PrivacyPlan(
    noise_multiplier=1.0,
    sampling_probability=0.01,
    steps=100,
    max_grad_norm=0.1,
    delta=1e-5,
    expected_batch_size=1.0,
)
"""Its figures do not change what a step costs."""


def bench_tune(config: RunConfig, student: Path, world: World) -> dict[str, Any]:
    """Time and memory of five kinds of step on `tune.batch_size` rows of `private_task.max_length` tokens, whole steps with Adam.

    Returns:
        See `measure`; and `max_difference`, the largest relative difference of an example's gradient from the plain private one's,
        over the ways to compute it, and of their sum from the non-private gradients.
    """
    if config.private_task is None:
        raise InputError(
            "bench tune needs the section `private_task`, for its label words and length"
        )
    tokenizer = load_tokenizer(student)
    model = load_whole(student, choose_precision(config.engine, world.device), world.device)
    verbalizer = Verbalizer(
        tuple(config.private_task.labels.values()),
        tokenizer,
        allow_multi_token=config.private_task.allow_multi_token,
    )
    rows, length, tokens = (
        config.tune.batch_size,
        config.private_task.max_length,
        config.tune.num_virtual_tokens,
    )
    raise_conflicts("bench tune", room_conflicts("the model", model.context_length, tokens, length))
    if model.masked:
        raise InputError(
            "bench tune compares ways to share a prefix, which a masked model has none of",
            "bench a causal student",
        )
    generator = torch.Generator().manual_seed(config.seed)
    input_ids = torch.randint(len(tokenizer), (rows, length), generator=generator)
    batch = Batch(input_ids, torch.ones_like(input_ids), torch.full((rows,), length - 1)).to(
        world.device
    )
    classes_B = torch.randint(len(verbalizer.token_ids), (rows,), generator=generator).to(
        world.device
    )
    start_nd = prompt_from_text(model, tokenizer, config.tune.init_text, tokens)

    def ordinary(*, share: bool) -> Callable[[], torch.Tensor]:
        prompt_nd = start_nd.clone().requires_grad_(True)
        optimizer = torch.optim.Adam([prompt_nd], lr=0.0)

        def step() -> torch.Tensor:
            optimizer.zero_grad()
            if share:
                prompt = PromptInput(prefix=model.prefix_of(prompt_nd))
                losses_B = class_losses(model, verbalizer, batch, classes_B, prompt)
            else:
                losses_B = plain_losses(model, verbalizer, batch, classes_B, prompt_nd)
            losses_B.mean().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            return rows * prompt_nd.grad.detach()  # type: ignore[union-attr]

        return step

    def private(gradients_at: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], torch.Tensor]:
        prompt_nd = start_nd.clone().requires_grad_(True)
        optimizer = PrivateOptimizer(
            torch.optim.Adam([prompt_nd], lr=0.0),
            _PLAN,
            RandomSource("bench", secrets.token_bytes(32)),
        )

        def step() -> torch.Tensor:
            gradients_Bnd = gradients_at(prompt_nd)
            optimizer.accumulate([gradients_Bnd])
            optimizer.finish(0, lambda commitment: None)
            return gradients_Bnd

        return step

    def exact(*, share: bool) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda prompt_nd: ExampleGradients(
            model, verbalizer, [prompt_nd], share_prefix=share
        )(batch, classes_B)[0]

    hooks = OpacusHooks(model, verbalizer, start_nd)
    steps = {
        "ordinary non-private": ordinary(share=False),
        "opacus hooks": private(lambda prompt_nd: hooks(batch, classes_B)),
        "dp": private(exact(share=False)),
        "dp shared prefix": private(exact(share=True)),
        "non-private shared prefix": ordinary(share=True),
    }
    plain_Bnd = steps["dp"]()
    differences = [
        _apart(steps[name](), plain_Bnd) for name in ("opacus hooks", "dp shared prefix")
    ]
    differences += [
        _apart(steps[name]()[None], plain_Bnd.sum(dim=0)[None])
        for name in ("ordinary non-private", "non-private shared prefix")
    ]
    settings = {
        "precision": str(model.model.dtype).removeprefix("torch."),
        "rows": rows,
        "tokens": length,
        "num_virtual_tokens": tokens,
    }
    return measure(steps, rows, "samples", world.device) | {
        "max_difference": max(differences),
        "settings": settings,
    }


def _apart(one_Bnd: torch.Tensor, other_Bnd: torch.Tensor) -> float:
    """The largest relative difference of a row."""
    apart_B = (one_Bnd - other_Bnd).flatten(1).norm(dim=1) / other_Bnd.flatten(1).norm(dim=1)
    return float(apart_B.max())
