"""Clip, sum, add noise: Opacus' DPOptimizer, with its three steps done exactly.

Clipped gradients are cut to multiples of C * 2^-30 and summed as integers, so the sum does not depend on the order or the
split of the examples, and its lowest bits tell nothing (Mironov 2012; arXiv 2207.13793). Cutting goes toward zero, so no
norm grows. The noise is drawn in fp64, rounded to the same grid and added as an integer: together with the integer sum this is
a rounding of the Gaussian mechanism's output, and so post-processing.

Shapes: B examples, ... a parameter's own shape.
"""

from collections.abc import Callable, Sequence

import torch
from opacus.optimizers import DPOptimizer
from torch.optim import Optimizer

from post_dist.privacy.plan import PrivacyPlan
from post_dist.privacy.randomness import RandomSource

GRID = 2.0**30
"""Steps of the integer grid in one C: room for 2^33 examples in an int64."""
_SHRINK = 1 - 2.0**-40
"""Keeps a clipped norm at C or below whatever fp64 rounds up."""

Intend = Callable[[str], None]
"""Called with a commitment to the sum before its noise is drawn; returns when the intent is safe on disk."""


class PrivateOptimizer(DPOptimizer):
    """Takes per-example gradients, and steps with their clipped, noisy mean.

    Args:
        optimizer: what takes the step, over fp32 parameters.
        plan: gives C, sigma and the divisor.
        source: of the run's noise.
        trial: which trial of a search this is.
    """

    def __init__(
        self, optimizer: Optimizer, plan: PrivacyPlan, source: RandomSource, trial: int = 0
    ) -> None:
        super().__init__(
            optimizer,
            noise_multiplier=plan.noise_multiplier,
            max_grad_norm=plan.max_grad_norm,
            expected_batch_size=plan.expected_batch_size,
        )
        self._source = source
        self._trial = trial
        self._step_number = 0
        self._intend: Intend = lambda commitment: None

    def accumulate(self, gradients: Sequence[torch.Tensor]) -> None:
        """Clip the gradients of some examples of the step, and add them to its sum.

        Args:
            gradients: for each parameter [B, ...]; B may be 0.
        """
        self._feed(gradients, last=False)

    def finish(self, step: int, intend: Intend) -> None:
        """Add noise to the sum, once, and take the step; also when no example was in it."""
        self._step_number, self._intend = step, intend
        self._feed(
            [parameter.new_zeros(0, *parameter.shape) for parameter in self.params], last=True
        )

    def clip_and_accumulate(self) -> None:
        """Add each example's clipped gradient to the integer sum. One that is not finite counts as zero."""
        gradients = [gradient.double() for gradient in self.grad_samples]
        flat = [gradient.flatten(1) for gradient in gradients]
        finite_B = torch.stack([part.isfinite().all(dim=1) for part in flat]).all(dim=0)
        squares_B = torch.stack([part.square().sum(dim=1) for part in flat]).sum(dim=0)
        factor_B = (
            (self.max_grad_norm / squares_B.sqrt()).clamp(max=1.0)
            * _SHRINK
            * (GRID / self.max_grad_norm)
        )
        factor_B = torch.where(finite_B, factor_B, 0.0)
        for parameter, part in zip(self.params, flat, strict=True):
            kept = torch.where(finite_B[:, None], part, 0.0) * factor_B[:, None]
            total = kept.trunc().long().sum(dim=0).view(parameter.shape)
            parameter.summed_grad = (
                total if parameter.summed_grad is None else parameter.summed_grad + total
            )

    def add_noise(self) -> None:
        """Announce the sum, draw its noise, and leave the noisy sum in `grad`."""
        sums = [parameter.summed_grad.cpu() for parameter in self.params]
        commitment = self._source.commitment(
            b"".join(total.numpy().tobytes() for total in sums),
            "sum",
            self._trial,
            self._step_number,
        )
        self._intend(commitment)
        noise = self._source.normal(
            sum(total.numel() for total in sums),
            "noise",
            self._trial,
            self._step_number,
            commitment,
        )
        steps = torch.from_numpy(noise * (self.noise_multiplier * GRID)).round().long()
        for parameter, total, drawn in zip(
            self.params, sums, steps.split([total.numel() for total in sums]), strict=True
        ):
            noisy = (total + drawn.view(total.shape)).double() * (self.max_grad_norm / GRID)
            parameter.grad = noisy.to(parameter.device, parameter.dtype)

    def _feed(self, gradients: Sequence[torch.Tensor], *, last: bool) -> None:
        for parameter, gradient in zip(self.params, gradients, strict=True):
            parameter.grad_sample = gradient
        self.signal_skip_step(not last)
        self.step()
        self.zero_grad()
