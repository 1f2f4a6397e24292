"""Prompt tuning as PEFT does it, and per-example gradients with Opacus' hooks.

Shapes: B examples, n prompt tokens, d width, V vocabulary.
"""

import torch
from opacus import GradSampleModule
from torch import nn
from torch.nn import functional

from post_dist.bench.peers.transfer import at_answers
from post_dist.data.template import Batch
from post_dist.data.verbalizer import Verbalizer
from post_dist.errors import InputError
from post_dist.models.language_model import LanguageModel


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
    logits_BV = model.head(at_answers(hidden_BTd, batch, prompt.shape[-2]))
    return functional.cross_entropy(verbalizer.scores(logits_BV), classes_B, reduction="none")


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
        # Every example looks up all rows of the prompt, so that the hooks see it.
        copies_Bnd = self._prompt(self._indices_n.expand(len(classes_B), -1))
        losses_B = plain_losses(self._model, self._verbalizer, batch, classes_B, copies_Bnd)
        losses_B.sum().backward()
        # pyrefly: ignore[missing-attribute]
        weight = self._prompt._module.embedding.weight
        gradients: torch.Tensor = weight.grad_sample
        # Opacus would add the next batch to these.
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
        # The change starts at zero, so the first step sees the student as it is.
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
        # The layers are replaced after the search, which would also find the new ones.
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
