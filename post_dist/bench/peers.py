"""Baselines for the benchmarks of the stages, written from each project's description.

Shapes: B examples, T tokens, P unmasked positions, n prompt tokens, d width, V vocabulary.
"""

from dataclasses import dataclass

import torch
from opacus import GradSampleModule
from torch import nn
from torch.nn import functional

from post_dist.config.schema import Distill, Transfer
from post_dist.data.template import Batch
from post_dist.data.verbalizer import Verbalizer
from post_dist.errors import InputError
from post_dist.losses.divergence import softened_kl
from post_dist.losses.heads import Head
from post_dist.losses.transfer import published_transfer_loss
from post_dist.models.language_model import LanguageModel

# Prompt tuning


def plain_losses(
    model: LanguageModel,
    verbalizer: Verbalizer,
    batch: Batch,
    classes_B: torch.Tensor,
    prompt: torch.Tensor,
) -> torch.Tensor:
    """Compute the losses of prompt tuning as PEFT does, with the prompt in front of every example.

    Args:
        model: the frozen model.
        verbalizer: maps logits to class scores.
        batch: the examples.
        classes_B: the right classes.
        prompt: [n, d], or [B, n, d].

    Returns:
        Losses [B].
    """
    hidden_BTd = model(batch.input_ids, batch.attention_mask, prompt)
    logits_BV = model.head(_at_answers(hidden_BTd, batch, prompt.shape[-2]))
    return functional.cross_entropy(verbalizer.scores(logits_BV), classes_B, reduction="none")


# Transfer


@dataclass(frozen=True)
class CachedLogits:
    """Logits at the answers that do not depend on the prompt that is trained, [B, V] each.

    Attributes:
        source: logits of the student without a prompt.
        source_prompted: logits of the student with the source prompt.
        target: logits of the target without a prompt.
    """

    source: torch.Tensor
    source_prompted: torch.Tensor
    target: torch.Tensor


def published_transfer_step(
    student: LanguageModel,
    target: LanguageModel,
    batch: Batch,
    source_nd: torch.Tensor,
    prompt_nd: torch.Tensor,
    section: Transfer,
) -> torch.Tensor:
    """Compute the loss of POST's utils/transfer.py.

    It runs four forward passes. Each computes the logits [B, n+T, V] of all positions and uses one
    of them per example. POST's code does more work: it also back-propagates through the
    prompted student, and runs the other forward passes with autograd on.

    Args:
        student: the student.
        target: the target.
        batch: the examples.
        source_nd: the source prompt.
        prompt_nd: the prompt that is trained.
        section: settings of the loss, with a number for `alpha`.

    Returns:
        The loss, a scalar.
    """
    with torch.no_grad():
        constants = CachedLogits(
            source=_logits_at_answers(student, batch, None),
            source_prompted=_logits_at_answers(student, batch, source_nd),
            target=_logits_at_answers(target, batch, None),
        )
    return cached_transfer_step(target, batch, constants, prompt_nd, section)


def cached_transfer_step(
    target: LanguageModel,
    batch: Batch,
    constants: CachedLogits,
    prompt_nd: torch.Tensor,
    section: Transfer,
) -> torch.Tensor:
    """Compute the published loss with less work, as an experienced PEFT user would write it.

    The constant logits are cached, and examples are padded to the longest one of the batch. The
    head still runs at all positions.

    Args:
        target: the target.
        batch: the examples.
        constants: cached logits of these examples.
        prompt_nd: the prompt that is trained.
        section: settings of the loss, with a number for `alpha`.

    Returns:
        The loss, a scalar.
    """
    return published_transfer_loss(
        constants.source,
        constants.source_prompted,
        constants.target,
        _logits_at_answers(target, batch, prompt_nd),
        alpha=float(section.alpha),
        temperature=section.temperature,
    )


def _logits_at_answers(
    model: LanguageModel, batch: Batch, prompt_nd: torch.Tensor | None
) -> torch.Tensor:
    """Compute the logits of all positions, and pick those at the answers: [B, V]."""
    logits = model.head(model(batch.input_ids, batch.attention_mask, prompt_nd))
    prompt_length = 0 if prompt_nd is None else len(prompt_nd)
    return _at_answers(logits, batch, prompt_length)


def _at_answers(states: torch.Tensor, batch: Batch, prompt_length: int) -> torch.Tensor:
    """Pick the states [B, ...] at the answers of states [B, n+T, ...]."""
    positions_B = batch.answer + prompt_length
    examples_B = torch.arange(len(positions_B), device=positions_B.device)
    return states[examples_B, positions_B]


# Distillation


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

    labelled = int((labels_BT != -100).sum()) / labels_BT.numel()
    scale = section.alpha_ce * section.temperature**2
    liger = LigerFusedLinearJSDLoss(
        section.alpha_lm, scale * labelled, beta=0.0, temperature=section.temperature
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

    last_BV = student_head(student_BTd[:, -1])
    wanted_BV = teacher_head(teacher_BTd[:, -1])
    last = (1 - labelled) * softened_kl(wanted_BV, last_BV, section.temperature)

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


# Private tuning with Opacus' hooks


class HookedPrompt(nn.Module):
    """A prompt that is looked up once per example, so that Opacus' hooks see each example.

    PEFT looks up the prompt once for the whole batch, and the hooks then record one gradient. See
    tests/privacy/test_gradients.py.

    Args:
        prompt_nd: initial values of the prompt.
    """

    def __init__(self, prompt_nd: torch.Tensor) -> None:
        super().__init__()
        self.embedding = nn.Embedding.from_pretrained(prompt_nd.clone(), freeze=False)

    def forward(self, indices_Bn: torch.Tensor) -> torch.Tensor:
        """Return the prompt [B, n, d], a copy for each example."""
        copies: torch.Tensor = self.embedding(indices_Bn)
        return copies


class OpacusHooks:
    """Computes per-example gradients of a prompt with Opacus' hooks.

    Args:
        model: the frozen model.
        verbalizer: maps logits to class scores.
        prompt_nd: the prompt at which gradients are computed.
    """

    def __init__(
        self, model: LanguageModel, verbalizer: Verbalizer, prompt_nd: torch.Tensor
    ) -> None:
        self._model = model
        self._verbalizer = verbalizer
        self._prompt = GradSampleModule(HookedPrompt(prompt_nd), loss_reduction="sum")
        self._indices_n = torch.arange(len(prompt_nd), device=prompt_nd.device)

    def __call__(self, batch: Batch, classes_B: torch.Tensor) -> torch.Tensor:
        """Return the gradient [B, n, d] of each example."""
        copies_Bnd = self._prompt(self._indices_n.expand(len(classes_B), -1))
        losses_B = plain_losses(self._model, self._verbalizer, batch, classes_B, copies_Bnd)
        losses_B.sum().backward()
        # pyrefly: ignore[missing-attribute]
        weight = self._prompt._module.embedding.weight
        gradients: torch.Tensor = weight.grad_sample
        weight.grad_sample = None
        weight.grad = None
        return gradients


class LowRank(nn.Module):
    """A frozen linear layer with a trained one of low rank beside it (LoRA, Hu et al. 2021).

    It consists of linear layers, which Opacus' hooks know. The trained layers are fp32, whatever
    the precision of the frozen one.

    Args:
        frozen: the frozen layer.
        rank: rank of the trained change.
    """

    def __init__(self, frozen: nn.Linear, rank: int) -> None:
        super().__init__()
        self.frozen = frozen
        self.down = nn.Linear(frozen.in_features, rank, bias=False)
        self.up = nn.Linear(rank, frozen.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return the output of the frozen layer plus the change."""
        change = self.up(self.down(inputs.to(self.down.weight.dtype)))
        outputs: torch.Tensor = self.frozen(inputs) + change.to(inputs.dtype)
        return outputs


class OpacusLora:
    """LoRA on the query and value projections of the student, with Opacus' per-example gradients.

    Args:
        model: the student. Its projections are replaced; at the start LoRA changes nothing.
        verbalizer: maps logits to class scores.
        rank: rank of the change.

    Attributes:
        parameters: the trained parameters.

    Raises:
        InputError: the model's projections are not named as in Llama's family.
    """

    def __init__(self, model: LanguageModel, verbalizer: Verbalizer, rank: int) -> None:
        projections = []
        for parent in model.layers.modules():
            for name in ("q_proj", "v_proj"):
                if hasattr(parent, name):
                    projections.append((parent, name))
        if not projections:
            raise InputError(
                "the LoRA baseline needs a model with layers q_proj and v_proj",
                "use a model of Llama's family",
            )
        for parent, name in projections:
            low_rank = LowRank(getattr(parent, name), rank)
            setattr(parent, name, low_rank.to(model.model.device))
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._model = GradSampleModule(model, loss_reduction="sum")
        self._verbalizer = verbalizer

    def __call__(self, batch: Batch, classes_B: torch.Tensor) -> list[torch.Tensor]:
        """Return the gradients [B, ...] of each parameter, one for each example."""
        logits_BV = self._model(batch.input_ids, batch.attention_mask, None, batch.answer)
        scores_BC = self._verbalizer.scores(logits_BV)
        loss = functional.cross_entropy(scores_BC, classes_B, reduction="sum")
        loss.backward()
        gradients: list[torch.Tensor] = []
        for parameter in self.parameters:
            # pyrefly: ignore[missing-attribute]
            gradients.append(parameter.grad_sample)
            # pyrefly: ignore[missing-attribute]
            parameter.grad_sample = None
            parameter.grad = None
        return gradients
