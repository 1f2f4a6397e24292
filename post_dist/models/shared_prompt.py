"""A soft prompt in front of many rows, run once: the rows lie behind it in one sequence, and none sees another.

In a causal model nothing of a prompt depends on what follows it, so B rows need n + B T positions in place of B (n + T), in one
forward and one backward, which is what a model in ZeRO-3 shards must gather its weights for. All layers but attention treat
positions alone; attention is cut back into rows here, so no mask [n + B T, n + B T] is ever made.

Shapes: G prompts, B rows of each, T tokens of a row, S = n + B T, n prompt tokens, H heads, h width of a head.
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

Attention = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]


@dataclass(frozen=True)
class Packing:
    """How sequences [G, S] are made up.

    Attributes:
        num_virtual_tokens: n.
        rows: B.
        length: T.
        answers_GB: the one place of each row that is wanted of the last layer.
    """

    num_virtual_tokens: int
    rows: int
    length: int
    answers_GB: torch.Tensor

    @property
    def places_GB(self) -> torch.Tensor:
        """Where the answers stand in the sequences."""
        starts_B = self.num_virtual_tokens + self.length * torch.arange(
            self.rows, device=self.answers_GB.device
        )
        return starts_B + self.answers_GB

    @property
    def groups_GB(self) -> torch.Tensor:
        """Which sequence each answer stands in."""
        return torch.arange(len(self.answers_GB), device=self.answers_GB.device)[:, None].expand_as(
            self.answers_GB
        )

    @property
    def position_ids_S(self) -> torch.Tensor:
        """Each row's positions go on from the prompt's."""
        positions = torch.arange(
            self.num_virtual_tokens + self.length, device=self.answers_GB.device
        )
        return torch.cat(
            [
                positions[: self.num_virtual_tokens],
                positions[self.num_virtual_tokens :].repeat(self.rows),
            ]
        )

    def attend(
        self,
        attention: Attention,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        **options: Any,
    ) -> torch.Tensor:
        """Attention [G, S, H, h] of queries [G, H, S, h] to keys and values, each row's to the prompt's and its own."""
        n, window = self.num_virtual_tokens, options.get("sliding_window")
        groups, heads, _, width = query.shape
        rows_key, rows_value = self._behind_prompt(key), self._behind_prompt(value)
        rows_query = self._rows(query[:, :, n:])
        mask = _causal(self.length, n, window, query.dtype, query.device)
        if (
            module.layer_idx == module.config.num_hidden_layers - 1
        ):  # no later layer reads any other place
            rows = torch.arange(len(rows_query), device=query.device)
            answers = self.answers_GB.flatten()
            asked = rows_query[rows, :, answers][:, :, None]
            made, _ = attention(
                module, asked, rows_key, rows_value, mask[0, 0, answers][:, None, None], **options
            )
            placed = made.new_zeros(groups, n + self.rows * self.length, heads, width)
            return placed.index_put(
                (self.groups_GB, self.places_GB), made.view(groups, self.rows, heads, width)
            )
        of_rows, _ = attention(module, rows_query, rows_key, rows_value, mask, **options)
        of_prompt_mask = _causal(n, 0, window, query.dtype, query.device)
        of_prompt, _ = attention(
            module, query[:, :, :n], key[:, :, :n], value[:, :, :n], of_prompt_mask, **options
        )
        return torch.cat(
            [of_prompt, of_rows.reshape(groups, self.rows * self.length, heads, width)], dim=1
        )

    def _rows(self, states_GHRh: torch.Tensor) -> torch.Tensor:
        """[G, H, B T, h] as [G B, H, T, h]."""
        groups, heads, _, width = states_GHRh.shape
        return (
            states_GHRh.view(groups, heads, self.rows, self.length, width)
            .transpose(1, 2)
            .flatten(0, 1)
        )

    def _behind_prompt(self, states_GHSh: torch.Tensor) -> torch.Tensor:
        """[G, H, S, h] as [G B, H, n + T, h], with the prompt's states in front of each row's."""
        n = self.num_virtual_tokens
        of_prompt = states_GHSh[:, None, :, :n].expand(-1, self.rows, -1, -1, -1).flatten(0, 1)
        return torch.cat([of_prompt, self._rows(states_GHSh[:, :, n:])], dim=2)


@lru_cache(maxsize=8)  # all layers of a step have the same one or two
def _causal(
    queries: int, before: int, window: int | None, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """What is added to the logits of attention of the last `queries` places to all, [1, 1, queries, before + queries]."""
    own = before + torch.arange(queries, device=device)[:, None]
    other = torch.arange(before + queries, device=device)
    allowed = (other <= own) if window is None else (other <= own) & (own - other < window)
    return torch.zeros(allowed.shape, dtype=dtype, device=device).masked_fill_(
        ~allowed, torch.finfo(dtype).min
    )[None, None]


def _eager(
    module: nn.Module, *states: Any, **options: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The plain products of the model's own family."""
    own: Attention = sys.modules[type(module).__module__].eager_attention_forward  # type: ignore[attr-defined]
    return own(module, *states, **options)


def _registered(attention: Attention) -> Attention:
    def attend(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        **options: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        packing: Packing | None = options.pop("packing", None)
        if packing is None:
            return attention(module, query, key, value, mask, **options)
        return packing.attend(attention, module, query, key, value, **options), None

    return attend


PACKABLE = {"eager": "post_dist_eager", "sdpa": "post_dist_sdpa"}
"""By transformers' name of a kind of attention, that of the same kind which also takes a `packing`."""
AttentionInterface.register(PACKABLE["eager"], _registered(_eager))
AttentionInterface.register(PACKABLE["sdpa"], _registered(sdpa_attention_forward))
AttentionMaskInterface.register(PACKABLE["eager"], eager_mask)
AttentionMaskInterface.register(PACKABLE["sdpa"], sdpa_mask)
