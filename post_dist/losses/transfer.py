"""Losses and logits of prompt transfer.

Shapes: B rows, K scores (the vocabulary, or the classes of a task), C classes, N public examples.
"""

import torch

from post_dist.losses.divergence import softened_kl

_SCALING_ROUNDS = 10_000
"""Limit of the loop, for extreme scores whose rounding errors exceed the tolerance."""
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
    """Compute (1 - alpha) L1 + alpha L2 (paper eq. 3 to 5).

    L1 makes the prompted target match the prompted source. L2 makes the effect of the prompt on the
    target match its effect on the source. It compares the softmax of both changes in logits.

    Args:
        source_BK: logits of the student without a prompt.
        source_prompted_BK: logits of the student with the tuned prompt.
        target_BK: logits of the large model without a prompt.
        target_prompted_BK: logits of the large model with the prompt that is trained.
        alpha: weight of L2, from 0 to 1.
        temperature: T of both divergences.
        shares_B: weight of each row; None takes the mean over rows.
    """
    mimic = softened_kl(source_prompted_BK, target_prompted_BK, temperature, shares_B)
    # In fp32, because each change is a difference of nearly equal logits.
    source_change_BK = source_prompted_BK.float() - source_BK.float()
    target_change_BK = target_prompted_BK.float() - target_BK.float()
    shift = softened_kl(source_change_BK, target_change_BK, temperature, shares_B)
    return (1 - alpha) * mimic + alpha * shift


def proxy_logits(
    source_BK: torch.Tensor | None,
    source_prompted_BK: torch.Tensor,
    target_BK: torch.Tensor,
    strength: float,
) -> torch.Tensor:
    """Compute proxy-tuned logits z_t(x) + lambda (z_s(p_s + x) - z_s(x)) in fp32.

    Proxy-tuning (Liu et al. 2024) needs no training.

    Args:
        source_BK: logits of the student without a prompt; None to subtract nothing.
        source_prompted_BK: logits of the student with the tuned prompt.
        target_BK: logits of the large model without a prompt.
        strength: lambda.
    """
    change_BK = source_prompted_BK.float()
    if source_BK is not None:
        change_BK = change_BK - source_BK.float()
    return target_BK.float() + strength * change_BK


def share_matching_offsets(scores_NC: torch.Tensor, shares_C: torch.Tensor) -> torch.Tensor:
    """Find offsets [C] so that class scores plus offsets have given mean probabilities.

    They move the threshold between the classes without labels. The offsets minimize a convex
    function, and iterative scaling finds the minimum.

    Args:
        scores_NC: class scores without offsets.
        shares_C: the mean probability that each class shall have; they sum to 1.
    """
    # In fp64, because fp32 cannot reach the tolerance.
    scores = scores_NC.double()
    wanted = shares_C.double().log()
    offsets = torch.zeros_like(wanted)
    for _ in range(_SCALING_ROUNDS):
        step = wanted - (scores + offsets).softmax(dim=1).mean(dim=0).log()
        offsets += step
        if step.abs().max() < _SCALING_TOLERANCE:
            break
    # An offset common to all classes does not change any probability.
    return (offsets - offsets.mean()).float()
