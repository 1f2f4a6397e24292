"""Evaluate a student on the held-out split of the corpus.

Shapes: B sequences, N sequences of all ranks, T tokens, d width, V vocabulary, K terms.
"""

from typing import Any

import torch
from torch.nn import functional

from post_dist.data.masking import NO_LABEL
from post_dist.losses.divergence import softened_kl, unexplained_share
from post_dist.losses.pieces import logit_pieces, split_positions
from post_dist.losses.terms import TERMS
from post_dist.runtime.distributed import World
from post_dist.runtime.gathering import gathered
from post_dist.stages.distill.batches import CorpusBatch, DistillationText
from post_dist.stages.distill.model import DistillationModel
from post_dist.stages.distill.online_teacher import OnlineTeacher


@torch.no_grad()
def held_out_metrics(
    engine: Any,
    teacher: OnlineTeacher,
    text: DistillationText,
    micro_batch_size: int,
    world: World,
) -> dict[str, float]:
    """Compute the metrics of a student on the held-out split. All ranks call it.

    The metrics tell how distillation went. A low KL divergence or unexplained share does not
    predict a good transfer (docs/method.md).

    Args:
        engine: the engine of the student.
        teacher: the teacher itself, because a cache holds no held-out sequences.
        text: the corpus.
        micro_batch_size: most sequences in one forward pass of a rank.
        world: the ranks.

    Returns:
        The mean of each loss term; `teacher_lm`, the teacher's own language-modeling loss; and two
        metrics at the position where the model would answer: `last_position_kl_nats` and
        `unexplained_share`.
    """
    # Each pass is a training step without its backward pass. The last positions are also kept.
    term_means = []
    student_last = []
    teacher_last = []
    for micro_batch in text.corpus.held_out_batches(micro_batch_size, world):
        batch = text.held_out(micro_batch)
        signal = teacher.signals_of(batch.numbers, batch.input_ids_BT, batch.positions_BT)
        _, terms, student_BTd = engine(
            batch.input_ids_BT, batch.labels_BT, batch.positions_BT, signal
        )
        teacher_lm = _loss_of_teacher(engine.module, signal.hidden, batch.labels_BT)
        means = torch.cat([terms.stacked(), teacher_lm[None]])
        term_means.append(micro_batch.weight * means)
        # A rank that has run out of sequences repeats one, which does not count.
        positions_B = _last_positions(batch, is_masked=text.is_masked)[: micro_batch.counted]
        sequences_B = torch.arange(micro_batch.counted, device=positions_B.device)
        student_last.append(student_BTd[sequences_B, positions_B].float())
        teacher_last.append(signal.hidden[sequences_B, positions_B].float())

    # The ranks may have unequal numbers of sequences. The weights make the mean exact.
    means_K = world.mean(torch.stack(term_means).mean(dim=0)).tolist()
    names = [*(term.metric for term in TERMS), "teacher_lm"]
    metrics = dict(zip(names, means_K, strict=True))
    student_Nd = world.concatenate(torch.cat(student_last))
    teacher_Nd = world.concatenate(torch.cat(teacher_last))
    metrics["last_position_kl_nats"] = _kl_of(engine.module, student_Nd, teacher_Nd)
    metrics["unexplained_share"] = unexplained_share(student_Nd, teacher_Nd)
    return metrics


def _last_positions(batch: CorpusBatch, *, is_masked: bool) -> torch.Tensor:
    """Return the position [B] that predicts a token: the last one, or the first masked one."""
    labels_BT = batch.labels_BT
    if is_masked:
        return (labels_BT != NO_LABEL).int().argmax(dim=1)
    sequences, length = labels_BT.shape
    return torch.full((sequences,), length - 1, device=labels_BT.device)


def _loss_of_teacher(
    model: DistillationModel, hidden_BTd: torch.Tensor, labels_BT: torch.Tensor
) -> torch.Tensor:
    """Compute the teacher's language-modeling loss, in nats, from its hidden states."""
    hidden_Nd = hidden_BTd.flatten(0, 1)
    labels_N = labels_BT.flatten()
    pieces = logit_pieces(len(labels_N), model.student.vocabulary_size)
    total = torch.zeros((), device=labels_N.device)
    # A sharded head is gathered once, for all pieces.
    with gathered(model):
        for piece in split_positions(len(labels_N), pieces):
            logits_BV = model.teacher_logits(hidden_Nd[piece]).float()
            total += functional.cross_entropy(
                logits_BV, labels_N[piece], ignore_index=NO_LABEL, reduction="sum"
            )
    return total / (labels_N != NO_LABEL).sum().clamp(min=1)


def _kl_of(model: DistillationModel, student_Bd: torch.Tensor, teacher_Bd: torch.Tensor) -> float:
    """Compute KL(teacher || student) in nats from the hidden states of both."""
    # A sharded head is gathered once, for the hidden states of both models.
    dtype = next(model.parameters()).dtype
    with gathered(model):
        teacher_BV = model.teacher_logits(teacher_Bd.to(dtype))
        student_BV = model.student.head(student_Bd.to(dtype))
    return float(softened_kl(teacher_BV, student_BV, temperature=1.0))
