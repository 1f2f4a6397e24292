"""The loss of a soft prompt for the target, from outputs that are computed once.

The published loss compares four outputs: those of the student and the target, each with and without
a prompt. Three of them do not depend on the trained prompt. `ObjectiveBuilder` computes these once,
before the first step, and this module reads them.

Class scores are stored as they are. Logits over a vocabulary, [N, V], would take too much memory.
The hidden states [N, d] in front of the head are stored instead, and the head runs in each step.

Shapes: N public examples, B examples of a step, K scores (vocabulary or classes), C classes,
V vocabulary, R tokens of a response, d width. For a prompt that generates text, each response token
has its own scores. In the loss, B then counts response tokens instead of examples.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

from post_dist.config.schema import Transfer
from post_dist.data.order import rows_of_like_length
from post_dist.data.task_reader import TaskReader
from post_dist.data.template import NO_TOKEN, Encoded
from post_dist.losses.divergence import softened_kl
from post_dist.losses.transfer import proxy_logits, published_transfer_loss
from post_dist.models.language_model import LanguageModel


@dataclass(frozen=True)
class ModelPair:
    """The two models of a transfer.

    Attributes:
        student: the model that the source prompts were tuned on, whole on every rank.
        target: the large model that they are transferred to, perhaps in ZeRO-3 shards.
    """

    student: LanguageModel
    target: LanguageModel


@dataclass(frozen=True)
class FixedOutputs:
    """Outputs for the public examples that do not depend on the trained prompt.

    Each tensor holds class scores [N, C] or hidden states [N, d]. For a prompt that generates text,
    it holds hidden states [N, R, d].

    Attributes:
        source: outputs of the student without a prompt; None if the loss does not need them.
        source_prompted: outputs of the student with the source prompt.
        target: outputs of the target without a prompt.
    """

    source: torch.Tensor | None
    source_prompted: torch.Tensor
    target: torch.Tensor


@dataclass(frozen=True)
class TransferObjective:
    """The loss of one prompt that is trained on the target.

    Attributes:
        section: settings of the loss, with a number for `alpha`.
        reader: the prompt's task, bound to the target's tokenizer.
        examples: public texts in the template, with their responses if the task generates text.
        outputs: outputs that are computed once.
        offsets: offsets [C] that are added to the proxy's scores, or a single zero [1].
        statistics: statistics of the models on the public text, by name.
    """

    section: Transfer
    reader: TaskReader
    examples: list[Encoded]
    outputs: FixedOutputs
    offsets: torch.Tensor
    statistics: Mapping[str, float]

    @property
    def stores_hidden(self) -> bool:
        """Whether `outputs` holds hidden states. Each step then runs the heads."""
        return self.section.scores == "vocabulary"

    @property
    def alpha(self) -> float:
        """Weight of the published loss's second term."""
        return float(self.section.alpha)

    @cached_property
    def _lengths(self) -> list[int]:
        return [len(example.token_ids) for example in self.examples]

    @cached_property
    def response_mask(self) -> torch.Tensor:
        """Mask [N, R] that is true where a response has a token."""
        return self.reader.responses(self.examples) != NO_TOKEN

    def batch_at(self, step: int, seed: int) -> list[int]:
        """Return the indices of a step's examples, over all ranks."""
        return rows_of_like_length(step, self.section.batch_size, self._lengths, seed)

    def select(self, chosen: list[int], stored: torch.Tensor) -> torch.Tensor:
        """Pick the stored outputs of some examples.

        Returns:
            [B, ...], one for each example, or one for each response token.
        """
        if self.reader.generates:
            return stored[chosen][self.response_mask[chosen]]
        return stored[chosen]

    def loss(
        self,
        chosen: list[int],
        prompted_BV: torch.Tensor,
        target_BV: torch.Tensor | None,
        student: LanguageModel,
    ) -> torch.Tensor:
        """Compute the mean loss of some examples.

        Args:
            chosen: indices of the examples.
            prompted_BV: logits of the target with the prompt, at the answers or at the response
                tokens, example by example.
            target_BV: logits of the target without a prompt at the same positions; None where class
                scores are stored.
            student: the student, whose head runs if hidden states are stored.

        Returns:
            The loss, a scalar in fp32.
        """
        # Read the student's stored outputs: class scores or hidden states.
        device = prompted_BV.device
        source_BK = None
        if self.outputs.source is not None:
            source_BK = self.select(chosen, self.outputs.source).to(device)
        source_prompted_BK = self.select(chosen, self.outputs.source_prompted).to(device)

        # Bring all four outputs to the same K scores.
        if target_BV is None:
            # The stored outputs are class scores already. Only the trained prompt gives logits.
            target_BK = self.select(chosen, self.outputs.target).to(device)
            prompted_BK = self.reader.scores(prompted_BV)
        else:
            # Models with one tokenizer may pad their vocabularies to different sizes. The tokens
            # beyond the smaller size occur in no text.
            common = min(student.vocabulary_size, target_BV.shape[1])
            target_BK = target_BV.detach()[:, :common]
            prompted_BK = prompted_BV[:, :common]
            # The student's head is frozen and reads stored states, so no gradient is needed.
            with torch.no_grad():
                if source_BK is not None:
                    source_BK = student.head(source_BK)[:, :common]
                prompted_logits = student.head(source_prompted_BK)
                biases = self.reader.task.class_biases
                # The class biases are part of the source prompt, so they raise its label words.
                lifted = self.reader.verbalizer.lift(prompted_logits, biases)
                source_prompted_BK = lifted[:, :common]

        weights_B = self._token_weights(chosen, device)
        if self.section.objective == "published" and source_BK is not None:
            return published_transfer_loss(
                source_BK,
                source_prompted_BK,
                target_BK,
                prompted_BK,
                alpha=self.alpha,
                temperature=self.section.temperature,
                shares_B=weights_B,
            )
        wanted_BK = self._wanted(source_BK, source_prompted_BK, target_BK)
        return softened_kl(wanted_BK, prompted_BK, self.section.temperature, weights_B)

    @property
    def wanted_scores(self) -> torch.Tensor:
        """Class scores [N, C] that the target shall have, where class scores are stored."""
        outputs = self.outputs
        return self._wanted(outputs.source, outputs.source_prompted, outputs.target)

    def _wanted(
        self,
        source_BK: torch.Tensor | None,
        source_prompted_BK: torch.Tensor,
        target_BK: torch.Tensor,
    ) -> torch.Tensor:
        """Compute the scores of proxy-tuning, or of the ensemble, which the target imitates."""
        strength = self.section.proxy_lambda
        proxy_BK = proxy_logits(source_BK, source_prompted_BK, target_BK, strength)
        return proxy_BK + self.offsets.to(proxy_BK.device)

    def _token_weights(self, chosen: list[int], device: torch.device) -> torch.Tensor | None:
        """Compute the weight of each response token, so that all examples have the same weight.

        Returns:
            Weights [B] that sum to 1; None for a task with classes, where each example has one
            answer.
        """
        if not self.reader.generates:
            return None
        # Each of B examples gets 1/B, divided equally among its tokens.
        mask_BR = self.response_mask[chosen].to(device)
        num_tokens_B1 = mask_BR.sum(dim=1, keepdim=True)
        weights_BR = (1 / (len(chosen) * num_tokens_B1)).expand_as(mask_BR)
        return weights_BR[mask_BR]
