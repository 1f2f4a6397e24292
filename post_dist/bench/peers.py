"""What the stages are compared with, written from what each describes.

Shapes: B rows, T tokens, n prompt tokens, d width, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

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


def plain_losses(
    model: LanguageModel,
    verbalizer: Verbalizer,
    batch: Batch,
    classes_B: torch.Tensor,
    prompt: torch.Tensor,
) -> torch.Tensor:
    """Losses [B] the ordinary way: the prompt before every row, the whole trunk, and the head at the answer."""
    hidden_BTd = model(batch.input_ids, batch.attention_mask, prompt)
    places_B = batch.answer + prompt.shape[-2]
    logits_BV = model.head(
        hidden_BTd[torch.arange(len(places_B), device=places_B.device), places_B]
    )
    return functional.cross_entropy(verbalizer.scores(logits_BV), classes_B, reduction="none")


def published_transfer_step(
    student: LanguageModel,
    target: LanguageModel,
    batch: Batch,
    source_nd: torch.Tensor,
    prompt_nd: torch.Tensor,
    section: Transfer,
) -> torch.Tensor:
    """The loss of POST's utils/transfer.py: four forwards, and in each the logits [B, n+T, V] of all positions, of which one is used.

    More generous than that code, which also goes back through the prompted student, and runs the others with autograd on.
    """
    device = batch.answer.device

    def at_answers(model: LanguageModel, prompt: torch.Tensor | None) -> torch.Tensor:
        places_B = batch.answer + (0 if prompt is None else len(prompt))
        return model.head(model(batch.input_ids, batch.attention_mask, prompt))[
            torch.arange(len(places_B), device=device), places_B
        ]

    with torch.no_grad():
        source_BV, source_prompted_BV, target_BV = (
            at_answers(student, None),
            at_answers(student, source_nd),
            at_answers(target, None),
        )
    weights: dict[str, Any] = {"alpha": section.alpha, "temperature": section.temperature}
    return published_transfer_loss(
        source_BV, source_prompted_BV, target_BV, at_answers(target, prompt_nd), **weights
    )


def cached_transfer_step(
    target: LanguageModel,
    batch: Batch,
    constants: Sequence[torch.Tensor],
    prompt_nd: torch.Tensor,
    section: Transfer,
) -> torch.Tensor:
    """The same loss as one would write it with PEFT and care: constants [B, V] kept, padding to the longest row, the head everywhere."""
    input_ids, places_B = batch.input_ids, batch.answer + len(prompt_nd)
    rows_B = torch.arange(len(places_B), device=places_B.device)
    logits = target.head(target(input_ids, batch.attention_mask, prompt_nd))[rows_B, places_B]
    weights: dict[str, Any] = {"alpha": section.alpha, "temperature": section.temperature}
    source_BV, source_prompted_BV, target_BV = constants
    return published_transfer_loss(source_BV, source_prompted_BV, target_BV, logits, **weights)


def published_distillation_loss(
    student_BTd: torch.Tensor,
    teacher_BTd: torch.Tensor,
    student_head: Head,
    teacher_head: Head,
    labels_BT: torch.Tensor,
    section: Distill,
) -> torch.Tensor:
    """The loss of POST's distill/distiller.py, which is DistilGPT2's: logits [B, T, V] of both, and copies of those that are no padding."""
    with torch.no_grad():
        teacher_logits = teacher_head(teacher_BTd)
    logits = student_head(student_BTd)
    mask = torch.ones_like(labels_BT, dtype=torch.bool)[..., None]
    chosen, wanted = (
        each.masked_select(mask.expand_as(each)).view(-1, each.shape[-1])
        for each in (logits, teacher_logits)
    )
    softened, target = (
        (chosen / section.temperature).log_softmax(dim=-1),
        (wanted / section.temperature).softmax(dim=-1),
    )
    ce = functional.kl_div(softened, target, reduction="batchmean") * section.temperature**2
    return _with_other_terms(
        ce,
        logits,
        labels_BT,
        student_BTd.masked_select(mask.expand_as(student_BTd)),
        teacher_BTd,
        section,
    )


def trl_distillation_loss(
    student_BTd: torch.Tensor,
    teacher_BTd: torch.Tensor,
    student_head: Head,
    teacher_head: Head,
    labels_BT: torch.Tensor,
    section: Distill,
) -> torch.Tensor:
    """The same with the divergence of TRL's GKD trainer.

    Raises:
        ImportError: TRL is not installed.
    """
    from trl.experimental.gkd import GKDTrainer  # type: ignore[import-not-found]

    with torch.no_grad():
        teacher_logits = teacher_head(teacher_BTd)
    logits = student_head(student_BTd)
    divergence = GKDTrainer.generalized_jsd_loss(
        logits, teacher_logits, beta=0, temperature=section.temperature, reduction="sum"
    )
    return _with_other_terms(
        divergence * section.temperature**2 / labels_BT.numel(),
        logits,
        labels_BT,
        student_BTd,
        teacher_BTd,
        section,
    )


def liger_distillation_loss(
    student_BTd: torch.Tensor,
    teacher_BTd: torch.Tensor,
    student_head: Head,
    teacher_head: Head,
    labels_BT: torch.Tensor,
    section: Distill,
) -> torch.Tensor:
    """The same with Liger's projection and divergence in one, a chunk of positions at a time, as it comes: compiled, 1,024 at a time.

    It leaves out the divergence where no label is asked for, so the last position of each sequence is added here.

    Raises:
        ImportError: Liger is not installed.
    """
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss  # type: ignore[import-not-found]

    share = int((labels_BT != -100).sum()) / labels_BT.numel()
    scale = section.alpha_ce * section.temperature**2
    liger = LigerFusedLinearJSDLoss(
        section.alpha_lm, scale * share, beta=0.0, temperature=section.temperature
    )
    weights = (head.weight for head in (student_head, teacher_head))  # type: ignore[attr-defined]
    pairs = zip((student_BTd.flatten(0, 1), teacher_BTd.flatten(0, 1)), weights, strict=True)
    loss = liger(*(part for pair in pairs for part in pair), labels_BT.flatten())
    last_BV, wanted_BV = (
        head(hidden[:, -1])
        for head, hidden in ((student_head, student_BTd), (teacher_head, teacher_BTd))
    )
    last = (1 - share) * softened_kl(wanted_BV, last_BV, section.temperature)
    cos = 1 - functional.cosine_similarity(student_BTd.float(), teacher_BTd.float(), dim=-1).mean()
    return loss + section.alpha_ce * last + section.alpha_cos * cos


def _with_other_terms(
    ce: torch.Tensor,
    logits: torch.Tensor,
    labels: torch.Tensor,
    hidden: torch.Tensor,
    teacher_BTd: torch.Tensor,
    section: Distill,
) -> torch.Tensor:
    lm = functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    student_Nd, teacher_Nd = hidden.view(-1, teacher_BTd.shape[-1]), teacher_BTd.flatten(0, 1)
    cos = functional.cosine_embedding_loss(
        student_Nd, teacher_Nd, torch.ones(len(teacher_Nd), device=teacher_Nd.device)
    )
    for term in (ce, lm, cos):
        term.item()  # that code logs each of them in every step
    return section.alpha_ce * ce + section.alpha_lm * lm + section.alpha_cos * cos


class HookedPrompt(nn.Module):
    """A prompt that Opacus' hooks see once per example: an embedding that every row of the batch looks up for itself.

    (PEFT looks it up once for the whole batch; the hooks then record one gradient. See tests/privacy/test_gradients.py.)
    """

    def __init__(self, prompt_nd: torch.Tensor) -> None:
        super().__init__()
        self.embedding = nn.Embedding.from_pretrained(prompt_nd.clone(), freeze=False)

    def forward(self, places_Bn: torch.Tensor) -> torch.Tensor:
        """The prompt [B, n, d], a copy for each row."""
        copies: torch.Tensor = self.embedding(places_Bn)
        return copies


class OpacusHooks:
    """Per-example gradients [B, n, d] by Opacus' hooks."""

    def __init__(
        self, model: LanguageModel, verbalizer: Verbalizer, prompt_nd: torch.Tensor
    ) -> None:
        self._model, self._verbalizer = model, verbalizer
        self._prompt = GradSampleModule(HookedPrompt(prompt_nd), loss_reduction="sum")
        self._places_n = torch.arange(len(prompt_nd), device=prompt_nd.device)

    def __call__(self, batch: Batch, classes_B: torch.Tensor) -> torch.Tensor:
        """The gradients at the prompt that was given first."""
        copies_Bnd = self._prompt(self._places_n.expand(len(classes_B), -1))
        plain_losses(self._model, self._verbalizer, batch, classes_B, copies_Bnd).sum().backward()  # type: ignore[no-untyped-call]
        weight = self._prompt._module.embedding.weight
        gradients: torch.Tensor = weight.grad_sample
        weight.grad_sample = weight.grad = None
        return gradients


class LowRank(nn.Module):
    """A frozen linear layer with a trained one of low rank beside it (LoRA, Hu et al. 2021): plain layers, which Opacus' hooks know.

    What is trained is fp32, whatever the frozen layer is.
    """

    def __init__(self, frozen: nn.Linear, rank: int) -> None:
        super().__init__()
        self.frozen = frozen
        self.down = nn.Linear(frozen.in_features, rank, bias=False)
        self.up = nn.Linear(rank, frozen.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        """What the frozen layer makes, and the change."""
        made: torch.Tensor = self.frozen(given) + self.up(
            self.down(given.to(self.down.weight.dtype))
        ).to(given.dtype)
        return made


class OpacusLora:
    """LoRA on the query and value projections of a model that the owner holds, with per-example gradients by Opacus' hooks.

    Args:
        model: its projections are replaced; LoRA starts from no change.
        verbalizer: from logits to class scores.
        rank: of the change.

    Raises:
        InputError: the model has no projections of the names that Llama's family uses.
    """

    def __init__(self, model: LanguageModel, verbalizer: Verbalizer, rank: int) -> None:
        places = [
            (parent, name)
            for parent in model.layers.modules()
            for name in ("q_proj", "v_proj")
            if hasattr(parent, name)
        ]
        if not places:
            raise InputError(
                "LoRA as a peer is written for models with layers q_proj and v_proj",
                "take one of Llama's family",
            )
        for parent, name in places:
            setattr(parent, name, LowRank(getattr(parent, name), rank).to(model.model.device))
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._model = GradSampleModule(model, loss_reduction="sum")
        self._verbalizer = verbalizer

    def __call__(self, batch: Batch, classes_B: torch.Tensor) -> list[torch.Tensor]:
        """Each example's gradients, for each parameter [B, ...], at its present value."""
        logits_BV = self._model(batch.input_ids, batch.attention_mask, None, batch.answer)
        scores_BC = self._verbalizer.scores(logits_BV)
        functional.cross_entropy(scores_BC, classes_B, reduction="sum").backward()  # type: ignore[no-untyped-call]
        gradients: list[torch.Tensor] = [parameter.grad_sample for parameter in self.parameters]  # type: ignore[attr-defined]
        for parameter in self.parameters:
            parameter.grad_sample = parameter.grad = None  # type: ignore[attr-defined]
        return gradients
