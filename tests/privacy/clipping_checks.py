"""Checks of the adaptive clipping norm."""

import math
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import torch
from privacy.checks import folder, fresh_source, part, plan_of
from privacy.ledger_checks import train_toy

QUANTILE = 0.7


def adaptive(source: Any, expected: float) -> tuple[Any, torch.Tensor]:
    """Return a private optimizer whose norm adapts, and its parameter of 400 numbers."""
    parameter = torch.zeros(400, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    made = plan_of(clip_quantile=QUANTILE, expected_batch_size=expected)
    return part("privacy.mechanism").PrivateOptimizer(optimizer, made, source), parameter


def the_clipping_norm_follows_its_quantile() -> None:
    """It ends near the quantile of all gradients, where one that is not finite counts as huge."""
    private, _ = adaptive(fresh_source(), 200.0)
    generator = torch.Generator().manual_seed(0)
    norms = 0.1 * torch.rand(200, generator=generator) + 0.01
    gradients = torch.zeros(200, 400)
    gradients[:, 0] = norms
    gradients[:20, 1] = float("nan")
    norms[:20] = math.inf
    reached = []
    for step in range(80):
        private.accumulate([gradients[:120]])
        private.accumulate([gradients[120:]])
        private.finish(step, lambda commitment: None)
        reached.append(private.max_grad_norm)
    wanted = float(norms.quantile(QUANTILE, interpolation="lower"))
    assert abs(np.mean(reached[40:]) / wanted - 1) < 0.1, "the norm is not at its quantile"


def the_clipping_norm_moves_by_a_noisy_quantile() -> None:
    """Also without examples; and the noise on the sum of gradients pays for the other noise."""
    moves = []
    deviations = []
    for _ in range(60):
        private, parameter = adaptive(fresh_source(), 20.0)
        for step in range(5):
            before = private.max_grad_norm
            start = parameter.detach().clone()
            private.finish(step, lambda commitment: None)
            moves.append(math.log(private.max_grad_norm / before))
            noise = (parameter.detach() - start) * 20 / before
            deviations.append(float(noise.square().mean().sqrt()))
        assert len(set(moves[-5:])) == 5, "two steps share the noise of their quantile"
    # No gradient: half of the expected batch counts as unclipped.
    assert abs(np.mean(moves) - 0.2 * (QUANTILE - 0.5)) < 0.004
    assert abs(np.std(moves) / (0.2 / 20) - 1) < 0.2, "the quantile lacks its noise"
    # Both sums together cost as much as one: 1 / sigma^2 = 1 / planned^2 + (1/2)^2 / 1^2.
    planned = (0.7**-2 - 0.5**2) ** -0.5
    paid = abs(np.mean(deviations) / planned - 1) < 0.01
    assert paid, "the noise on the sum does not pay for the quantile"


def a_norm_is_added_up_in_one_order() -> None:
    """A row's squares are folded in halves, so its norm has the same bits in every batch."""
    generator = torch.Generator().manual_seed(1)
    found = 0
    for _ in range(30):
        row = torch.randn(1, 5_000, generator=generator, dtype=torch.float64)
        for ulps in range(-8, 9):
            on_edge = row / row.norm() * (1 + ulps * 2.0**-53)
            is_small = math.sqrt(folded_squares(on_edge[0].numpy())) <= 1
            if is_small != bool(on_edge.square().sum().sqrt() <= 1):
                found += 1
                assert (small_among(on_edge) == 1) == is_small, "the order of the sum is another"
    assert found, "torch.sum adds in this order too: this check tests nothing"


def folded_squares(row: np.ndarray) -> float:
    """Return the sum of squares, where the upper half is added to the lower one each time."""
    values = row**2
    while len(values) > 1:
        lower = values[: (len(values) + 1) // 2].copy()
        lower[: len(values) // 2] += values[len(lower) :]
        values = lower
    return float(values[0])


def small_among(gradient: torch.Tensor, others: int = 0) -> int:
    """Return what a gradient and some gradients of zero add to the count of small gradients."""
    parameter = torch.zeros(gradient.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    made = replace(plan_of(clip_quantile=QUANTILE), max_grad_norm=1.0)
    private = part("privacy.mechanism").PrivateOptimizer(optimizer, made, fresh_source())
    private.accumulate([torch.cat([gradient, gradient.new_zeros(others, gradient.shape[1])])])
    return int(private._unclipped)


def an_adaptive_run_resumes_with_its_norm() -> None:
    plan = plan_of(clip_quantile=QUANTILE, sampling_probability=1.0)
    trainer = part("privacy.trainer")
    save = trainer.save_tensors

    class Killed(Exception):
        pass

    def save_and_die(checkpoints: Any, step: int, tensors: Any) -> None:
        save(checkpoints, step, tensors)
        if step == 3:
            raise Killed

    with folder() as place:
        source = fresh_source()
        straight = train_toy(place, source, plan, scale=0.1)
        shutil.rmtree(place / "checkpoints")
        with mock.patch.object(trainer, "save_tensors", save_and_die), suppress(Killed):
            train_toy(place, source, plan, scale=0.1)
        assert torch.equal(train_toy(place, source, plan, scale=0.1), straight)


CHECKS: list[Callable[[], None]] = [
    the_clipping_norm_follows_its_quantile,
    the_clipping_norm_moves_by_a_noisy_quantile,
    a_norm_is_added_up_in_one_order,
    an_adaptive_run_resumes_with_its_norm,
]
