"""The losses of transfer.

Shapes: B rows, K scores (vocabulary or classes), C classes, N rows.
"""

import torch

from post_dist.losses.divergence import softened_kl

_SCALING_ROUNDS = 10_000
_SCALING_TOLERANCE = 1e-9


def published_transfer_loss(
    source_BK: torch.Tensor,
    source_prompted_BK: torch.Tensor,
    target_BK: torch.Tensor,
    target_prompted_BK: torch.Tensor,
    *,
    alpha: float,
    temperature: float,
    shares_B: torch.Tensor | None = None,
) -> torch.Tensor:
    """(1-alpha) L1 + alpha L2 (paper eq. 3 to 5).

    L1 has the prompted target mimic the prompted source; L2 has it change as the source does under its prompt, the
    changes in logits going through the softmax themselves.
    """
    mimic = softened_kl(source_prompted_BK, target_prompted_BK, temperature, shares_B)
    changes = (
        source_prompted_BK.float() - source_BK.float(),
        target_prompted_BK.float() - target_BK.float(),
    )
    shift = softened_kl(*changes, temperature, shares_B)
    return (1 - alpha) * mimic + alpha * shift


def proxy_logits(
    source_BK: torch.Tensor,
    source_prompted_BK: torch.Tensor,
    target_BK: torch.Tensor,
    strength: float,
) -> torch.Tensor:
    """z_t(x) + lambda (z_s(p_s+x) - z_s(x)) in fp32: proxy-tuning (Liu et al. 2024), which needs no training."""
    return target_BK.float() + strength * (source_prompted_BK.float() - source_BK.float())


def share_matching_offsets(scores_NC: torch.Tensor, reference_NC: torch.Tensor) -> torch.Tensor:
    """Offsets [C] that give class scores the reference's mean class probabilities over the same rows.

    Adding two models' logit changes also adds their class biases. The prompted student has learned the task's threshold, so
    on public text its mean probabilities say where the proxy's threshold belongs; no label is needed. The fixed point is
    the minimum of a convex function, and iterative scaling finds it.
    """
    scores = scores_NC.double()
    wanted = reference_NC.double().softmax(dim=1).mean(dim=0).log()
    offsets = torch.zeros_like(wanted)
    for _ in range(_SCALING_ROUNDS):
        step = wanted - (scores + offsets).softmax(dim=1).mean(dim=0).log()
        offsets += step
        if step.abs().max() < _SCALING_TOLERANCE:
            break
    return (offsets - offsets.mean()).float()
