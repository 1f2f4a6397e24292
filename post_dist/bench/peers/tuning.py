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
