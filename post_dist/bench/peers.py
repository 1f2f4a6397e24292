"""What the stages are compared with, written from what each describes.

Shapes: B rows, T tokens, n prompt tokens, d width, V vocabulary.
"""

import torch
from opacus import GradSampleModule
from torch import nn
from torch.nn import functional

from post_dist.data.template import Batch, Verbalizer
from post_dist.models.language_model import LanguageModel


def plain_losses(model: LanguageModel, verbalizer: Verbalizer, batch: Batch, classes_B: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
    """Losses [B] the ordinary way: the prompt before every row, the whole trunk, and the head at the answer."""
    hidden_BTd = model(batch.input_ids, batch.attention_mask, prompt)
    places_B = batch.answer + prompt.shape[-2]
    logits_BV = model.head(hidden_BTd[torch.arange(len(places_B), device=places_B.device), places_B])
    return functional.cross_entropy(verbalizer.scores(logits_BV), classes_B, reduction="none")


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

    def __init__(self, model: LanguageModel, verbalizer: Verbalizer, prompt_nd: torch.Tensor) -> None:
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
