"""Losses of distillation: the published code, TRL and Liger.

Shapes: B examples, T tokens, P unmasked positions, d width, V vocabulary.
"""

import torch
from torch.nn import functional

from post_dist.config.schema import Distill
from post_dist.losses.divergence import softened_kl
from post_dist.losses.heads import Head


def published_distillation_loss(
    student_BTd: torch.Tensor,
    teacher_BTd: torch.Tensor,
    student_head: Head,
    teacher_head: Head,
    labels_BT: torch.Tensor,
    section: Distill,
) -> torch.Tensor:
    """Compute the loss of POST's distill/distiller.py, which is that of DistilGPT2.

    It computes the logits [B, T, V] of both models, and copies those that are not padding.

    Args:
        student_BTd: last hidden states of the student.
        teacher_BTd: last hidden states of the teacher.
        student_head: maps hidden states to logits.
        teacher_head: maps hidden states to logits.
        labels_BT: the next tokens; -100 where there is none.
        section: weights and temperature.

    Returns:
        The loss, a scalar.
    """
    with torch.no_grad():
        teacher_logits = teacher_head(teacher_BTd)
    student_logits = student_head(student_BTd)

    # The published code copies the unmasked positions even where nothing is padded.
    mask = torch.ones_like(labels_BT, dtype=torch.bool)[..., None]
    student_chosen = _masked_copy(student_logits, mask)
    teacher_chosen = _masked_copy(teacher_logits, mask)
    softened = (student_chosen / section.temperature).log_softmax(dim=-1)
    target = (teacher_chosen / section.temperature).softmax(dim=-1)
    divergence = functional.kl_div(softened, target, reduction="batchmean")
    ce = divergence * section.temperature**2

    student_hidden = student_BTd.masked_select(mask.expand_as(student_BTd))
    return _with_other_terms(ce, student_logits, labels_BT, student_hidden, teacher_BTd, section)


def trl_distillation_loss(
    student_BTd: torch.Tensor,
    teacher_BTd: torch.Tensor,
    student_head: Head,
    teacher_head: Head,
    labels_BT: torch.Tensor,
    section: Distill,
) -> torch.Tensor:
    """Compute the published loss with the divergence of TRL's GKD trainer.

    Args:
        student_BTd: last hidden states of the student.
        teacher_BTd: last hidden states of the teacher.
        student_head: maps hidden states to logits.
        teacher_head: maps hidden states to logits.
        labels_BT: the next tokens; -100 where there is none.
        section: weights and temperature.

    Returns:
        The loss, a scalar.

    Raises:
        ImportError: TRL is not installed.
    """
    from trl.experimental.gkd import GKDTrainer

    with torch.no_grad():
        teacher_logits = teacher_head(teacher_BTd)
    student_logits = student_head(student_BTd)
    # With beta 0, the generalized divergence is the forward KL of the published loss.
    divergence = GKDTrainer.generalized_jsd_loss(
        student_logits, teacher_logits, beta=0, temperature=section.temperature, reduction="sum"
    )
    ce = divergence * section.temperature**2 / labels_BT.numel()
    return _with_other_terms(ce, student_logits, labels_BT, student_BTd, teacher_BTd, section)


def liger_distillation_loss(
    student_BTd: torch.Tensor,
    teacher_BTd: torch.Tensor,
    student_head: Head,
    teacher_head: Head,
    labels_BT: torch.Tensor,
    section: Distill,
) -> torch.Tensor:
    """Compute the published loss with Liger's fused projection and divergence.

    Liger runs with its defaults: compiled, and 1,024 positions at a time. It leaves out the
    divergence at positions without a label. The last position of each sequence has no label, so
    its divergence is added here.

    Args:
        student_BTd: last hidden states of the student.
        teacher_BTd: last hidden states of the teacher.
        student_head: maps hidden states to logits; one matrix.
        teacher_head: maps hidden states to logits; one matrix.
        labels_BT: the next tokens; -100 where there is none.
        section: weights and temperature.

    Returns:
        The loss, a scalar.

    Raises:
        ImportError: Liger is not installed.
    """
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    # Liger divides by the number of labels, and the published loss by that of all positions.
    labeled = int((labels_BT != -100).sum()) / labels_BT.numel()
    scale = section.alpha_ce * section.temperature**2
    liger = LigerFusedLinearJSDLoss(
        section.alpha_lm, scale * labeled, beta=0.0, temperature=section.temperature
    )
    # pyrefly: ignore[missing-attribute]
    student_weight = student_head.weight
    # pyrefly: ignore[missing-attribute]
    teacher_weight = teacher_head.weight
    loss = liger(
        student_BTd.flatten(0, 1),
        student_weight,
        teacher_BTd.flatten(0, 1),
        teacher_weight,
        labels_BT.flatten(),
    )

    # The divergence of the last positions, which Liger leaves out.
    last_BV = student_head(student_BTd[:, -1])
    wanted_BV = teacher_head(teacher_BTd[:, -1])
    last = (1 - labeled) * softened_kl(wanted_BV, last_BV, section.temperature)

    similarity = functional.cosine_similarity(student_BTd.float(), teacher_BTd.float(), dim=-1)
    cos = 1 - similarity.mean()
    return loss + section.alpha_ce * last + section.alpha_cos * cos


def _masked_copy(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Copy the logits [P, V] at the unmasked positions; `mask` is [B, T, 1]."""
    chosen = logits.masked_select(mask.expand_as(logits))
    return chosen.view(-1, logits.shape[-1])


def _with_other_terms(
    ce: torch.Tensor,
    logits: torch.Tensor,
    labels_BT: torch.Tensor,
    hidden: torch.Tensor,
    teacher_BTd: torch.Tensor,
    section: Distill,
) -> torch.Tensor:
    """Add the language-modeling loss and the cosine loss to the divergence, with their weights."""
    lm = functional.cross_entropy(logits.flatten(0, 1), labels_BT.flatten())
    student_Nd = hidden.view(-1, teacher_BTd.shape[-1])
    teacher_Nd = teacher_BTd.flatten(0, 1)
    similar = torch.ones(len(teacher_Nd), device=teacher_Nd.device)
    cos = functional.cosine_embedding_loss(student_Nd, teacher_Nd, similar)
    # The published code logs each term in every step, which waits for the GPU.
    for term in (ce, lm, cos):
        term.item()
    return section.alpha_ce * ce + section.alpha_lm * lm + section.alpha_cos * cos
