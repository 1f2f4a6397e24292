"""The private mechanism: clip each example's gradient, sum, add Gaussian noise.

`PrivateOptimizer` is the DPOptimizer of Opacus with exact sums.

Clipped gradients are truncated to multiples of C * 2^-30 and summed as integers. So the sum does
not depend on the order or the split of the examples. Its lowest bits reveal nothing (Mironov 2012;
arXiv 2207.13793). Truncation rounds toward zero, so no norm grows. The noise is drawn in fp64,
rounded to the same grid and added as an integer. The result equals the output of the Gaussian
mechanism rounded to the grid, and rounding is post-processing.

Shapes: B examples; "..." is the shape of a parameter.
"""

import math
from collections.abc import Callable, Sequence

import torch
from opacus.optimizers import DPOptimizer
from torch.optim import Optimizer

from post_dist.privacy.plan import PrivacyPlan
from post_dist.privacy.randomness import RandomSource

GRID = 2.0**30
"""Grid steps per clipping norm C. An int64 then has room for the sum of 2^33 examples."""

# How fast the clipping norm follows its quantile (arXiv 1905.03871), and its bounds.
_CLIP_RATE = 0.2
_LEAST_NORM = 1e-6
_MOST_NORM = 1e6

# Keeps a clipped norm at C or below when fp64 rounds up.
_SHRINK = 1 - 2.0**-40

Intend = Callable[[str], None]
"""Function that takes the commitment to a sum, and is called before its noise is drawn.

It returns when the intent is safe on disk.
"""


class PrivateOptimizer(DPOptimizer):
    """Takes per-example gradients, and steps with the noisy mean of the clipped gradients.

    Args:
        optimizer: takes the step on fp32 parameters.
        plan: gives the clipping norm C, the noise multiplier sigma and the divisor.
        source: randomness of the run.
        trial: number of the trial in a search; 0 without a search.
    """

    def __init__(
        self, optimizer: Optimizer, plan: PrivacyPlan, source: RandomSource, trial: int = 0
    ) -> None:
        super().__init__(
            optimizer,
            noise_multiplier=plan.gradient_noise_multiplier,
            max_grad_norm=plan.max_grad_norm,
            # pyrefly: ignore[bad-argument-type]
            expected_batch_size=plan.expected_batch_size,
        )
        # Opacus has set it already, without a type.
        self.max_grad_norm: float = plan.max_grad_norm
        self._plan = plan
        self._source = source
        self._trial = trial
        # Twice the number of unclipped gradients minus the number of all. It stays on the device:
        # reading it for each micro-batch would wait for the device.
        self._unclipped: torch.Tensor | int = 0
        self._step_number = 0
        self._intend: Intend = lambda commitment: None

    def accumulate(self, gradients: Sequence[torch.Tensor]) -> None:
        """Clip the gradients of some examples and add them to the sum of the step.

        Args:
            gradients: per-example gradients [B, ...] of each parameter; B may be 0.
        """
        self._feed(gradients, last=False)

    def finish(self, step: int, intend: Intend) -> None:
        """Add noise to the sum once, and take the step.

        A step without examples works in the same way.

        Args:
            step: number of the step.
            intend: writes the step's intent to disk; called before the noise is drawn.
        """
        self._step_number = step
        self._intend = intend
        # Opacus adds the noise with the last micro-batch, so an empty one ends the step.
        no_examples = [parameter.new_zeros(0, *parameter.shape) for parameter in self.params]
        self._feed(no_examples, last=True)

    def clip_and_accumulate(self) -> None:
        """Add each example's clipped gradient to the integer sum.

        A gradient that is not finite counts as zero.
        """
        # fp64 holds the norm of any fp32 gradient without overflow.
        flat = [gradient.double().flatten(1) for gradient in self.grad_samples]
        finite_B = _finite_examples(flat)
        # One norm over all parameters: the prompt and the class biases share the clipping norm.
        squares_B = [_folded(part.square()) for part in flat]
        norm_B = sum(squares_B[1:], start=squares_B[0]).sqrt()
        factor_B = torch.where(finite_B, self._grid_factors(norm_B), 0.0)
        unclipped_B = finite_B & (norm_B <= self.max_grad_norm)
        self._unclipped = self._unclipped + (2 * unclipped_B.long() - 1).sum()
        for parameter, gradient in zip(self.params, flat, strict=True):
            # NaN times zero is NaN, so values that are not finite are replaced first.
            finite = torch.where(finite_B[:, None], gradient, 0.0)
            kept = finite * factor_B[:, None]
            # Truncate toward zero, so that no norm grows. Integer sums do not depend on the order.
            total = kept.trunc().long().sum(dim=0).view(parameter.shape)
            # pyrefly: ignore[missing-attribute]
            if parameter.summed_grad is not None:
                total = parameter.summed_grad + total
            # pyrefly: ignore[missing-attribute]
            parameter.summed_grad = total

    def add_noise(self) -> None:
        """Record the commitment to the sum, draw the noise, and store the noisy sum in `grad`."""
        # pyrefly: ignore[missing-attribute]
        sums = [parameter.summed_grad.cpu() for parameter in self.params]
        # The commitment is a keyed digest of the exact integer sum.
        place = (self._trial, self._step_number)
        data = b"".join(total.numpy().tobytes() for total in sums)
        if self._plan.clip_quantile is not None:
            data += str(int(self._unclipped)).encode()
        commitment = self._source.commitment(data, "sum", *place)
        sizes = [total.numel() for total in sums]
        # The ledger charges the step before its noise exists, so a kill cannot hide spending.
        self._intend(commitment)
        # The commitment is part of the noise's name, so another sum gets independent noise.
        noise = self._source.normal(sum(sizes), "noise", *place, commitment)
        # The noise in grid steps: sigma * C is sigma * 2^30 of them.
        steps = torch.from_numpy(noise * (self.noise_multiplier * GRID)).round().long()
        for parameter, total, drawn in zip(self.params, sums, steps.split(sizes), strict=True):
            noisy = (total + drawn.view(total.shape)).double() * (self.max_grad_norm / GRID)
            # Opacus divides by the expected batch size after this.
            parameter.grad = noisy.to(parameter.device, parameter.dtype)
        if self._plan.clip_quantile is not None:
            self._adapt_norm(self._plan.clip_quantile, *place, commitment)
        self._unclipped = 0

    def _adapt_norm(self, quantile: float, *name: object) -> None:
        """Move the clipping norm of the next step toward a quantile of the gradient norms.

        Args:
            quantile: the quantile.
            *name: name of the step, for its noise.
        """
        noise = float(self._source.normal(1, "unclipped", *name)[0])
        noisy_count = int(self._unclipped) / 2 + noise * self._plan.count_deviation
        fraction = 0.5 + noisy_count / self._plan.expected_batch_size
        norm = self.max_grad_norm * math.exp(-_CLIP_RATE * (fraction - quantile))
        self.max_grad_norm = min(max(norm, _LEAST_NORM), _MOST_NORM)

    def _grid_factors(self, norm_B: torch.Tensor) -> torch.Tensor:
        """Return the factors [B] that clip gradients of these norms to norm C, in grid steps."""
        clip_B = (self.max_grad_norm / norm_B).clamp(max=1.0)
        return clip_B * _SHRINK * (GRID / self.max_grad_norm)

    def _feed(self, gradients: Sequence[torch.Tensor], *, last: bool) -> None:
        """Pass gradients to the step of Opacus, which adds noise and steps only for the last."""
        for parameter, gradient in zip(self.params, gradients, strict=True):
            # pyrefly: ignore[missing-attribute]
            parameter.grad_sample = gradient
        self.signal_skip_step(not last)
        self.step()
        self.zero_grad()


def _folded(values_Bm: torch.Tensor) -> torch.Tensor:
    """Return the sum [B] of each row, in fp64. It overwrites the values.

    A row's sum has the same bits in every batch, on every device. `torch.sum` splits a long row by
    the number of rows, so one example could move another's norm across the clipping norm.
    """
    width = values_Bm.shape[1]
    while width > 1:
        # The upper half of each row is added to its lower half, and a middle value is kept.
        upper = width // 2
        width -= upper
        values_Bm[:, :upper] += values_Bm[:, width : width + upper]
    return values_Bm[:, 0]


def _finite_examples(flat: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return for each example [B] whether its gradient is finite in all parameters."""
    return torch.stack([part.isfinite().all(dim=1) for part in flat]).all(dim=0)
