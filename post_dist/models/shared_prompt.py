"""Run a soft prompt once for all examples of a batch, packed after it into one sequence.

In a causal model the hidden states of a prompt do not depend on the text after it. So B examples
need n + B T positions instead of B (n + T), in one forward and one backward pass. A ZeRO-3 model
then gathers its weights only once.

All parts of a layer except attention process each position independently, so packing does not
change them. Here attention treats examples separately: each one attends to the prompt and to
itself. No mask [n + B T, n + B T] is built.

Shapes: G prompts, B examples of each prompt, T tokens of an example, n prompt tokens, H heads,
h width of a head, S = n + B T positions of a packed sequence.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from post_dist.models.families import has_local_attention

Attention = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]
"""Attention of transformers: (module, query, key, value, mask, **options) -> (output, weights)."""


@dataclass(frozen=True)
class Packing:
    """Layout of packed sequences [G, S]: first the prompt, then its examples one after another.

    Attributes:
        num_virtual_tokens: number n of prompt tokens.
        rows: number B of examples after each prompt.
        length: number T of tokens of each example, padding included.
        answers_GB: answer position of each example, counted within the example. The last layer
            computes attention only at these positions.
    """

    num_virtual_tokens: int
    rows: int
    length: int
    answers_GB: torch.Tensor

    @property
    def places_GB(self) -> torch.Tensor:
        """Answer positions, counted within the packed sequence."""
        example_B = torch.arange(self.rows, device=self.answers_GB.device)
        starts_B = self.num_virtual_tokens + self.length * example_B
        return starts_B + self.answers_GB

    @property
    def groups_GB(self) -> torch.Tensor:
        """Index of the packed sequence that holds each answer."""
        groups = torch.arange(len(self.answers_GB), device=self.answers_GB.device)
        return groups[:, None].expand_as(self.answers_GB)

    @property
    def position_ids_S(self) -> torch.Tensor:
        """Position ids for the model: each example continues from the end of the prompt."""
        n = self.num_virtual_tokens
        positions = torch.arange(n + self.length, device=self.answers_GB.device)
        example_positions = positions[n:].repeat(self.rows)
        return torch.cat([positions[:n], example_positions])

    def attend(
        self,
        attention: Attention,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        **options: Any,
    ) -> torch.Tensor:
        """Compute attention in packed sequences: each example attends to the prompt and itself.

        Args:
            attention: computes the attention of one batch of ordinary sequences.
            module: the attention layer.
            query: [G, H, S, h].
            key: [G, H, S, h], with fewer heads in a model with grouped queries.
            value: same shape as `key`, but for the width of a head.
            options: options of transformers for `attention`. `sliding_window` limits the mask.

        Returns:
            The outputs [G, S, H, h], as wide as the values.

        Raises:
            TypeError: the layer may look back over a window alone, and does not pass it.
        """
        # Some families put the window into the mask alone, which is not read here.
        if "sliding_window" not in options and has_local_attention(module.config):
            raise TypeError(f"{type(module).__name__} does not pass its window")
        # Split the packed states. Each example gets the prompt's keys and values before its own.
        n = self.num_virtual_tokens
        window = options.get("sliding_window")
        example_query = self._as_examples(query[:, :, n:])
        example_key = self._prepend_prompt(key)
        example_value = self._prepend_prompt(value)
        mask = _causal_mask(self.length, n, window, query.dtype, query.device)

        # No layer reads other positions of the last layer, so it computes attention only at the
        # answers.
        if module.layer_idx == module.config.num_hidden_layers - 1:
            answers = self.answers_GB.flatten()
            examples = torch.arange(len(example_query), device=query.device)
            answer_query = example_query[examples, :, answers][:, :, None]
            answer_mask = mask[0, 0, answers][:, None, None]
            outputs, _ = attention(
                module, answer_query, example_key, example_value, answer_mask, **options
            )
            return self._at_answers(outputs)

        # In all other layers, two calls of ordinary attention handle the examples and the prompt.
        example_outputs, _ = attention(
            module, example_query, example_key, example_value, mask, **options
        )
        prompt_mask = _causal_mask(n, 0, window, query.dtype, query.device)
        prompt_outputs, _ = attention(
            module, query[:, :, :n], key[:, :, :n], value[:, :, :n], prompt_mask, **options
        )
        # Put the outputs back in the order of the packed sequence.
        # Outputs are as wide as values, which latent attention makes narrower than queries.
        heads, width = example_outputs.shape[-2:]
        packed_outputs = example_outputs.reshape(len(query), self.rows * self.length, heads, width)
        return torch.cat([prompt_outputs, packed_outputs], dim=1)

    def _at_answers(self, outputs: torch.Tensor) -> torch.Tensor:
        """Place outputs [G B, 1, H, h] at the answers of packed sequences [G, S, H, h] of zeros."""
        heads, width = outputs.shape[-2:]
        groups = len(self.answers_GB)
        positions = self.num_virtual_tokens + self.rows * self.length
        zeros = outputs.new_zeros(groups, positions, heads, width)
        values = outputs.view(groups, self.rows, heads, width)
        return zeros.index_put((self.groups_GB, self.places_GB), values)

    def _as_examples(self, states_GHRh: torch.Tensor) -> torch.Tensor:
        """Reshape the examples of packed sequences, [G, H, B T, h], to a batch [G B, H, T, h]."""
        groups, heads, _, width = states_GHRh.shape
        by_example = states_GHRh.view(groups, heads, self.rows, self.length, width)
        return by_example.transpose(1, 2).flatten(0, 1)

    def _prepend_prompt(self, states_GHSh: torch.Tensor) -> torch.Tensor:
        """Copy the prompt's states in front of each example: [G, H, S, h] to [G B, H, n + T, h]."""
        n = self.num_virtual_tokens
        prompt_states = states_GHSh[:, None, :, :n].expand(-1, self.rows, -1, -1, -1)
        example_states = self._as_examples(states_GHSh[:, :, n:])
        return torch.cat([prompt_states.flatten(0, 1), example_states], dim=2)


@lru_cache(maxsize=8)  # all layers of a step share one or two masks
def _causal_mask(
    queries: int, before: int, window: int | None, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Build the additive causal mask of the last `queries` positions of a sequence.

    Returns:
        [1, 1, queries, before + queries], with 0 where a query may attend.
    """
    query_position = before + torch.arange(queries, device=device)[:, None]
    key_position = torch.arange(before + queries, device=device)
    allowed = key_position <= query_position
    if window is not None:
        allowed = allowed & (query_position - key_position < window)
    # The smallest number instead of minus infinity keeps a query without allowed keys finite.
    mask = torch.zeros(allowed.shape, dtype=dtype, device=device)
    mask.masked_fill_(~allowed, torch.finfo(dtype).min)
    return mask[None, None]


def _eager_attention(
    module: nn.Module, *states: Any, **options: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Call the eager attention from the modeling file of the model family."""
    modeling_file = sys.modules[type(module).__module__]
    family_attention: Attention = vars(modeling_file)["eager_attention_forward"]
    return family_attention(module, *states, **options)


def _with_packing(attention: Attention) -> Attention:
    """Wrap an attention function so that it also takes an option `packing`."""

    def attend(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **options: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        packing: Packing | None = options.pop("packing", None)
        if packing is None:
            return attention(module, query, key, value, attention_mask, **options)
        return packing.attend(attention, module, query, key, value, **options), None

    return attend


PACKABLE = {"eager": "post_dist_eager", "sdpa": "post_dist_sdpa"}
"""Name of the version with the option `packing`, for each attention of transformers."""

# transformers looks up attention and mask by the same name, so each new name registers both.
AttentionInterface.register(PACKABLE["eager"], _with_packing(_eager_attention))
AttentionInterface.register(PACKABLE["sdpa"], _with_packing(sdpa_attention_forward))
AttentionMaskInterface.register(PACKABLE["eager"], eager_mask)
AttentionMaskInterface.register(PACKABLE["sdpa"], sdpa_mask)
