"""A causal or masked language model with room for a soft prompt in front, split into trunk and head.

Shapes: B rows, T tokens, n prompt tokens, d width, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from post_dist.errors import InputError


class LanguageModel(nn.Module):
    """Wraps a transformers model; its forward gives hidden states, or logits at one position a row.

    Attributes:
        model: the transformers model.
        masked: whether it fills in masks; otherwise it predicts the next token.
    """

    def __init__(self, model: PreTrainedModel, *, masked: bool) -> None:
        super().__init__()
        self.model = model
        self.masked = masked
        parts = [name for name, _ in model.named_children() if name != model.base_model_prefix]
        if model.base_model is model or len(parts) != 1:
            raise InputError(f"{type(model).__name__} is not one trunk with one head, so its head cannot be told apart")
        self._head_name = parts[0]

    @property
    def width(self) -> int:
        """The width d of embeddings and hidden states."""
        return int(self.model.config.get_text_config().hidden_size)

    @property
    def vocabulary_size(self) -> int:
        """How many tokens have an embedding."""
        return int(self.model.config.get_text_config().vocab_size)

    @property
    def context_length(self) -> int:
        """Most tokens that the positions reach; RoBERTa's first positions are taken by its padding index."""
        config = self.model.config
        reserved = (config.pad_token_id or 0) + 1 if config.model_type in ("roberta", "xlm-roberta", "camembert") else 0
        return int(config.max_position_embeddings - reserved)

    @property
    def head_module(self) -> nn.Module:
        """From hidden states to logits, before any soft cap."""
        module: nn.Module = getattr(self.model, self._head_name)
        return module

    @property
    def layers(self) -> nn.ModuleList:
        """The transformer layers.

        Raises:
            InputError: they are not in one ModuleList.
        """
        return cast(nn.ModuleList, self.model.get_submodule(layer_list_name(self.model)))

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Input embeddings [..., d], as the trunk takes them."""
        embeddings: torch.Tensor = self.model.get_input_embeddings()(input_ids)
        return embeddings

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [..., V] of hidden states [..., d]."""
        return self.capped(self.head_module(hidden))

    def capped(self, logits: torch.Tensor) -> torch.Tensor:
        """The soft cap that Gemma 2 puts on its logits; other families have none."""
        cap = getattr(self.model.config.get_text_config(), "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        prompt: torch.Tensor | None = None,
        answer: torch.Tensor | None = None,
        prefix: Sequence[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Run the trunk, and the head where an answer is wanted.

        Args:
            input_ids: [B, T], padded on the right.
            attention_mask: [B, T]; None when nothing is padded.
            prompt: soft prompt [n, d], put before every row, or [B, n, d] with one for each.
            answer: [B], the position of each row's answer, counted without the prompt.
            prefix: in a prompt's place, its keys and values from `prefix_of`, shared or expanded to B rows.

        Returns:
            The trunk's last hidden states [B, n+T, d] ([B, T, d] behind a prefix); with `answer`, the logits [B, V] there.
        """
        embeddings = self.embed(input_ids)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        before = 0 if prompt is None else prompt.shape[-2]
        if prompt is not None:
            embeddings = torch.cat([prompt.to(embeddings.dtype).expand(len(input_ids), -1, -1), embeddings], dim=1)
        seen_before = before if prefix is None else prefix[0].shape[-2]
        mask = torch.cat([mask.new_ones(len(mask), seen_before), mask], dim=1)
        inputs = {"inputs_embeds": embeddings, "attention_mask": mask, **self._cache(prefix, len(input_ids))}
        if answer is None:
            return cast(torch.Tensor, self.model.base_model(**inputs).last_hidden_state)
        rows, places = torch.arange(len(answer), device=answer.device), answer + before
        with self._last_mlp_at(rows, places):
            hidden = self.model.base_model(**inputs).last_hidden_state
        return self.head(hidden[rows, places])

    @contextmanager
    def _last_mlp_at(self, rows: torch.Tensor, places: torch.Tensor) -> Iterator[None]:
        """While entered, the last layer's MLP runs at one position a row: no later layer reads its others.

        It is two thirds of a layer, which counts in a student of a few. Families without a module `mlp` run it whole.
        """
        mlp = getattr(self.layers[-1], "mlp", None)
        if mlp is None:
            yield
            return

        length = 0

        def pick(module: nn.Module, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            nonlocal length
            length = given[0].shape[1]
            return (given[0][rows, places][:, None], *given[1:])

        def put_back(module: nn.Module, given: tuple[torch.Tensor, ...], made: torch.Tensor) -> torch.Tensor:
            return made.new_zeros(len(rows), length, made.shape[-1]).index_put((rows, places), made[:, 0])

        hooks = [mlp.register_forward_pre_hook(pick), mlp.register_forward_hook(put_back)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def checkpoint_activations(self) -> None:
        """From now on, keep only what goes into each layer for the backward pass, and compute the rest a second time there.

        The last layer is left out: what hooks make of its MLP is gone by then. Only the layers themselves are told that they
        train, for transformers asks them; their dropout stays off.
        """
        self.model.gradient_checkpointing_enable({"use_reentrant": False})
        for layer in self.layers[:-1]:
            layer.training = True

    def prefix_of(self, prompt_nd: torch.Tensor) -> list[torch.Tensor]:
        """Keys and values of a prompt in every layer, in turn, each [1, heads, n, head width].

        In a causal model no later token changes them, so all rows of a step can share one computation of them.
        """
        cache: Any = DynamicCache()
        embeddings = prompt_nd.to(self.model.dtype)[None]
        self.model.base_model(inputs_embeds=embeddings, cache=cache, use_cache=True)
        return [states for layer in cache.layers for states in (layer.keys, layer.values)]

    def _cache(self, prefix: Sequence[torch.Tensor] | None, rows: int) -> dict[str, Any]:
        if self.masked:
            return {}
        if prefix is None:
            return {"use_cache": False}
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(zip(prefix[::2], prefix[1::2], strict=True)):
            cache.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1), layer)
        return {"cache": cache, "use_cache": True}


def check_split(language_model: LanguageModel) -> None:
    """Compare trunk and head, run apart, with the model's own forward.

    Raises:
        InputError: they differ, as for a model that scales or caps its logits in a way not known here.
    """
    device = language_model.model.device
    input_ids = torch.arange(4, 8, device=device)[None]
    with torch.no_grad():
        ours = language_model.head(language_model(input_ids)).float()
        own = language_model.model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids)).logits.float()
    if not torch.allclose(ours, own, rtol=1e-2, atol=1e-2 * float(own.abs().max())):
        raise InputError(f"{type(language_model.model).__name__} does more to its logits than post_dist knows of")


def layer_list_name(model: PreTrainedModel) -> str:
    """The name of the one ModuleList that holds the transformer layers.

    Raises:
        InputError: there is none, or there are several.
    """
    wanted = model.config.get_text_config().num_hidden_layers
    found = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) == wanted]
    if len(found) != 1:
        raise InputError(f"{type(model).__name__} keeps its {wanted} layers in {len(found)} lists, not in one")
    return found[0]
