"""A causal or masked language model with room for a soft prompt in front, split into trunk and head.

Shapes: B rows, T tokens, n prompt tokens, d width, V vocabulary, K tokens of it.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel

from post_dist.errors import InputError
from post_dist.models.shared_prompt import PACKABLE, Packing
from post_dist.runtime.zero import gathered

_SCALES = ("logits_scaling", "logit_scale", "lm_head_multiplier")
"""What Granite, Cohere and Falcon-H1 call theirs."""


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
            raise InputError(
                f"{type(model).__name__} is not one trunk with one head, so its head cannot be told apart"
            )
        self._head_name = parts[0]
        if not masked and model._supports_attention_backend:
            model.set_attn_implementation(PACKABLE[model.config._attn_implementation])

    @property
    def width(self) -> int:
        """The width d of embeddings and hidden states."""
        return int(self.model.config.get_text_config().hidden_size)

    @property
    def vocabulary_size(self) -> int:
        """How many tokens have an embedding."""
        return int(self.model.config.get_text_config().vocab_size)

    @property
    def context_length(self) -> float:
        """Most tokens that the positions reach: any number in BLOOM; RoBERTa's first positions are taken by its padding index."""
        config = self.model.config
        reserved = (
            (config.pad_token_id or 0) + 1
            if config.model_type in ("roberta", "xlm-roberta", "camembert")
            else 0
        )
        longest: float = getattr(
            config, "max_position_embeddings", getattr(config, "max_seq_len", math.inf)
        )
        return longest - reserved

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

    @property
    def takes_packing(self) -> bool:
        """Whether its kind of attention takes a `packing`."""
        return self.model.config._attn_implementation in PACKABLE.values()

    @cached_property
    def shares_prompt(self) -> bool:
        """Whether rows behind a shared prompt come out as they do behind one each, found by trying: some families take no `packing`.

        All ranks of a sharded model must come here together.
        """
        if not self.takes_packing:
            return False
        device = self.model.device
        input_ids = torch.arange(4, 12, device=device).view(2, 4)
        answer = torch.tensor([3, 2], device=device)
        with torch.no_grad():
            prompt_nd = self.embed(torch.arange(12, 15, device=device))
            apart = self(input_ids, prompt=prompt_nd, answer=answer).float()
            try:
                shared = self(input_ids, prompt=prompt_nd, answer=answer, share_prompt=True).float()
            except (
                TypeError,
                AttributeError,
            ):  # a forward that takes no further words, or attention that does not know its layer
                return False
        return torch.allclose(shared, apart, rtol=1e-2, atol=1e-2 * float(apart.abs().max()))

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Input embeddings [..., d], as the trunk takes them."""
        embeddings: torch.Tensor = self.model.get_input_embeddings()(input_ids)
        return embeddings

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [..., V] of hidden states [..., d]."""
        return self.capped(self.head_module(hidden))

    def head_of(self, tokens: Sequence[int]) -> Callable[[torch.Tensor], torch.Tensor]:
        """From hidden states [..., d] to the logits [..., K] of K tokens alone, by their rows of the head where it is one matrix.

        Those of a sharded head are gathered here, once; all ranks come here together.
        """
        head = self.head_module
        if not isinstance(head, nn.Linear):
            return lambda hidden: self.head(hidden)[..., list(tokens)]
        with gathered(head):
            rows = torch.tensor(tokens, device=head.weight.device)
            weight, bias = head.weight[rows], None if head.bias is None else head.bias[rows]
        return lambda hidden: self.capped(functional.linear(hidden, weight, bias))

    @property
    def logit_cap(self) -> float | None:
        """The soft cap that Gemma 2 puts on its logits; other families have none."""
        return getattr(self.model.config.get_text_config(), "final_logit_softcapping", None)

    @property
    def has_linear_head(self) -> bool:
        """Whether the logits are one matrix's, with nothing added and no cap."""
        head = self.head_module
        return isinstance(head, nn.Linear) and head.bias is None and self.logit_cap is None

    def capped(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits under the soft cap, if there is one."""
        return (
            logits
            if self.logit_cap is None
            else self.logit_cap * torch.tanh(logits / self.logit_cap)
        )

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        prompt: torch.Tensor | None = None,
        answer: torch.Tensor | None = None,
        prefix: Sequence[torch.Tensor] | None = None,
        *,
        share_prompt: bool = False,
        position_ids: torch.Tensor | None = None,
        with_head: bool = True,
        tokens: Sequence[int] | None = None,
        beside: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run the trunk, and the head where an answer is wanted.

        Args:
            input_ids: [B, T], padded on the right.
            attention_mask: [B, T]; None when nothing is padded. A causal model has no need of it: padding on the right is not seen.
            prompt: soft prompt [n, d], put before every row, or [B, n, d] with one for each.
            answer: [B], the position of each row's answer, counted without the prompt.
            prefix: in a prompt's place, its keys and values from `prefix_of`, shared or expanded to B rows.
            share_prompt: run `prompt` once for all rows that follow it (see `shared_prompt`). It may then be [G, n, d]: the first of
                G equal parts of the rows follows the first. A causal model that `shares_prompt`, and an answer, are needed.
            position_ids: [B, T], for a causal model without a prompt: where they begin anew, what stands before is not seen.
            with_head: whether the head is run at the answers.
            tokens: those whose logits are wanted, [B, K]; all if None.
            beside: hidden states [M, d] of earlier answers, whose logits are wanted too: one gathering of a sharded head serves both.

        Returns:
            The trunk's last hidden states [B, n+T, d] ([B, T, d] behind a prefix); with `answer`, the logits [B+M, V] there, or, without
            the head, the hidden states [B, d].
        """
        if answer is None:
            positions = {} if position_ids is None else {"position_ids": position_ids}
            return self._hidden(self._inputs(input_ids, attention_mask, prompt, prefix) | positions)
        if share_prompt and prompt is not None:
            prompts_Gnd = prompt.view(-1, *prompt.shape[-2:])
            packing = Packing(
                prompt.shape[-2],
                len(input_ids) // len(prompts_Gnd),
                input_ids.shape[1],
                answer.view(len(prompts_Gnd), -1),
            )
            inputs, rows, places = (
                self._packed_inputs(input_ids, prompts_Gnd, packing),
                packing.groups_GB,
                packing.places_GB,
            )
        else:
            inputs = self._inputs(input_ids, attention_mask, prompt, prefix)
            rows, places = (
                torch.arange(len(answer), device=answer.device),
                answer + (0 if prompt is None else prompt.shape[-2]),
            )
        with self._last_mlp_at(rows.flatten(), places.flatten()):
            hidden = self._hidden(inputs)[rows.flatten(), places.flatten()]
        hidden = hidden if beside is None else torch.cat([hidden, beside])
        if not with_head:
            return hidden
        return self.head(hidden) if tokens is None else self.head_of(tokens)(hidden)

    def _hidden(self, inputs: dict[str, Any]) -> torch.Tensor:
        return cast(torch.Tensor, self.model.base_model(**inputs).last_hidden_state)

    def _inputs(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        prompt: torch.Tensor | None,
        prefix: Sequence[torch.Tensor] | None,
    ) -> dict[str, Any]:
        embeddings = self.embed(input_ids)
        if prompt is not None:
            embeddings = torch.cat(
                [prompt.to(embeddings.dtype).expand(len(input_ids), -1, -1), embeddings], dim=1
            )
        if not self.masked:
            return {"inputs_embeds": embeddings, **self._cache(prefix, len(input_ids))}
        if attention_mask is None:
            return {"inputs_embeds": embeddings}
        before = embeddings.shape[1] - attention_mask.shape[1]
        return {
            "inputs_embeds": embeddings,
            "attention_mask": torch.cat(
                [attention_mask.new_ones(len(input_ids), before), attention_mask], dim=1
            ),
        }

    def _packed_inputs(
        self, input_ids: torch.Tensor, prompts_Gnd: torch.Tensor, packing: Packing
    ) -> dict[str, Any]:
        rows = self.embed(input_ids)
        return {
            "inputs_embeds": torch.cat(
                [prompts_Gnd.to(rows.dtype), rows.view(len(prompts_Gnd), -1, self.width)], dim=1
            ),
            "position_ids": packing.position_ids_S[None],
            "attention_mask": rows.new_empty(
                1, 1, 1, 1
            ),  # of four dimensions, it is left alone; no attention reads it
            "use_cache": False,
            "packing": packing,
        }

    @contextmanager
    def _last_mlp_at(self, rows: torch.Tensor, places: torch.Tensor) -> Iterator[None]:
        """While entered, the last layer's MLP runs at the places [rows, places] alone: no later layer reads its others.

        It is two thirds of a layer, which counts in a student of a few. Families without a module `mlp` run it whole.
        """
        mlp = getattr(self.layers[-1], "mlp", None)
        if mlp is None:
            yield
            return

        whole = torch.Size()

        def pick(module: nn.Module, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            nonlocal whole
            whole = given[0].shape[:2]
            return (given[0][rows, places][:, None], *given[1:])

        def put_back(
            module: nn.Module, given: tuple[torch.Tensor, ...], made: torch.Tensor
        ) -> torch.Tensor:
            return made.new_zeros(*whole, made.shape[-1]).index_put((rows, places), made[:, 0])

        hooks = [mlp.register_forward_pre_hook(pick), mlp.register_forward_hook(put_back)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def checkpoint_activations(self) -> None:
        """From now on, keep only what goes into each layer for the backward pass, and compute the rest a second time there.

        The last layer is left out: what hooks make of its MLP is gone by then. transformers' own way asks a layer whether it trains,
        and some families' layers would then drop out at random; here nothing is random, and both times come out alike.
        """
        for layer in self.layers[:-1]:
            layer.forward = partial(
                checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False
            )

    def prefix_of(self, prompt_nd: torch.Tensor) -> list[torch.Tensor]:
        """Keys and values of a prompt in every layer, in turn, each [1, heads, n, head width].

        In a causal model no later token changes them, so all rows of a step can share one computation of them.
        """
        cache: Any = DynamicCache()
        embeddings = prompt_nd.to(self.model.dtype)[None]
        self.model.base_model(inputs_embeds=embeddings, cache=cache, use_cache=True)
        return [states for layer in cache.layers for states in (layer.keys, layer.values)]

    def _cache(self, prefix: Sequence[torch.Tensor] | None, rows: int) -> dict[str, Any]:
        if prefix is None:
            return {"use_cache": False}
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(zip(prefix[::2], prefix[1::2], strict=True)):
            cache.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1), layer)
        return {"cache": cache, "use_cache": True}


def check_no_scale(config: PretrainedConfig) -> None:
    """Look for a scale of the logits in the settings of a model that is to be sharded.

    `check_split` would find it out by a pass through the whole model, after which ZeRO keeps weights for a second use that never comes.

    Raises:
        InputError: there is one.
    """
    settings = config.get_text_config()
    if any(getattr(settings, name, None) not in (None, 1.0) for name in _SCALES):
        raise InputError(f"a {settings.model_type} does more to its logits than post_dist knows of")


def check_split(language_model: LanguageModel) -> None:
    """Compare trunk and head, run apart, with the model's own forward.

    Raises:
        InputError: they differ, as for a model that scales or caps its logits in a way not known here.
    """
    device = language_model.model.device
    input_ids = torch.arange(4, 8, device=device)[None]
    with torch.no_grad():
        ours = language_model.head(language_model(input_ids)).float()
        own = language_model.model(
            input_ids=input_ids, attention_mask=torch.ones_like(input_ids)
        ).logits.float()
    if not torch.allclose(ours, own, rtol=1e-2, atol=1e-2 * float(own.abs().max())):
        raise InputError(
            f"{type(language_model.model).__name__} does more to its logits than post_dist knows of"
        )


def check_documents_apart(language_model: LanguageModel) -> None:
    """Compare a document behind another one with the same at the front. All ranks of a sharded model come here together.

    Raises:
        InputError: they differ, as in a family whose attention goes by no positions.
    """
    one, other = torch.arange(4, 12, device=language_model.model.device).view(2, 4)
    positions = torch.arange(4, device=one.device).repeat(2, 2)
    with torch.no_grad():
        hidden = language_model(
            torch.stack([torch.cat([one, other]), torch.cat([other, one])]), position_ids=positions
        ).float()
    if not torch.allclose(
        hidden[0, 4:], hidden[1, :4], rtol=1e-2, atol=1e-2 * float(hidden.abs().max())
    ):
        raise InputError(
            f"corpus.separate_documents: in a {type(language_model.model).__name__} packed documents see each other all the same",
            "set corpus.separate_documents: false",
        )


def layer_list_name(model: PreTrainedModel) -> str:
    """The name of the one ModuleList that holds the transformer layers.

    Raises:
        InputError: there is none, or there are several.
    """
    wanted = model.config.get_text_config().num_hidden_layers
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == wanted
    ]
    if len(found) != 1:
        raise InputError(
            f"{type(model).__name__} keeps its {wanted} layers in {len(found)} lists, not in one"
        )
    return found[0]
