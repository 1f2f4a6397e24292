"""A causal or masked language model, split into trunk and head, that takes a soft prompt.

Shapes: B examples, T tokens, n prompt tokens, d width, V vocabulary, K selected tokens, G prompts
that share a forward pass, M earlier answers, S = n + B T positions of a packed sequence.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any, cast

import torch
from torch import func, nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

from post_dist.errors import InputError
from post_dist.models import families
from post_dist.models.agreement import agree
from post_dist.models.last_layer import run_at
from post_dist.models.layer_outputs import outputs_at
from post_dist.models.shared_prompt import PACKABLE, Packing
from post_dist.runtime.gathering import gathered

Logits = Callable[[torch.Tensor], torch.Tensor]
"""Function from hidden states [..., d] to logits [..., K]."""

PrefixProduct = Callable[[tuple[torch.Tensor, ...]], tuple[torch.Tensor]]
"""Maps the gradients [B, 1, ...] of a prefix to those of the prompt [B, n, d]."""


class LanguageModel(nn.Module):
    """Wraps a transformers model. Its forward pass returns hidden states, or logits at the answers.

    Args:
        model: a transformers model that consists of one trunk and one head.
        masked: whether it is a masked language model; otherwise it is causal.

    Attributes:
        is_compiled: whether `compile_layers` has compiled its layers.

    Raises:
        InputError: the head of the model cannot be identified, or its embeddings have another width
            than its hidden states.
    """

    def __init__(self, model: PreTrainedModel, *, masked: bool) -> None:
        super().__init__()
        self.model = model
        self.masked = masked
        self.is_compiled = False
        self._head_name = families.head_name(model)
        self._in_place: Sequence[torch.Tensor] | None = None
        width_of_embeddings = getattr(model.get_input_embeddings(), "embedding_dim", self.width)
        if width_of_embeddings != self.width:
            raise InputError(
                f"{type(model).__name__}: the embeddings have width {width_of_embeddings}, and the "
                f"hidden states {self.width}",
                "use a model with one width",
            )
        # Replace the attention by a version that takes a `packing`, if the family allows it.
        if not masked and model._supports_attention_backend:
            model.set_attn_implementation(PACKABLE[str(model.config._attn_implementation)])

    # Properties of the model.

    @property
    def width(self) -> int:
        """Width d of embeddings and hidden states."""
        return int(self.model.config.get_text_config().hidden_size)

    @property
    def vocabulary_size(self) -> int:
        """Number of tokens that have an embedding."""
        return int(self.model.config.get_text_config().vocab_size)

    @property
    def context_length(self) -> float:
        """Largest number of tokens; infinite in families without a limit."""
        own = families.context_length(self.model.config)
        return min(own, families.positions_after_padding(self.model))

    @property
    def logit_cap(self) -> float | None:
        """The soft cap on the logits; None in families without one."""
        return families.logit_cap(self.model.config)

    @property
    def layers(self) -> nn.ModuleList:
        """The transformer layers.

        Raises:
            InputError: the layers are not in one ModuleList.
        """
        name = families.layer_list_name(self.model)
        return cast(nn.ModuleList, self.model.get_submodule(name))

    @property
    def head_module(self) -> nn.Module:
        """The module that maps hidden states to logits, without any soft cap."""
        module: nn.Module = getattr(self.model, self._head_name)
        return module

    @property
    def has_linear_head(self) -> bool:
        """Whether the logits are one matrix product, without a bias and a soft cap."""
        head = self.head_module
        return isinstance(head, nn.Linear) and head.bias is None and self.logit_cap is None

    @property
    def has_experts(self) -> bool:
        """Whether a router chooses the weights that compute a token."""
        stacked = any(weight.dim() == 3 for weight in self.layers.parameters())
        return stacked or families.experts_per_token(self.model.config) is not None

    @property
    def takes_packing(self) -> bool:
        """Whether the attention of this model takes a `packing`."""
        return self.model.config._attn_implementation in PACKABLE.values()

    @cached_property
    def shares_prompt(self) -> bool:
        """Whether one shared prompt gives the same outputs as a copy of the prompt per example.

        A trial run finds out, because some families do not pass a `packing` on to their attention.
        All ranks of a sharded model must call it together.
        """
        if not self.takes_packing:
            return False
        with self._trial():
            input_ids_BT, answer_B, prompt_nd = self._trial_inputs()
            separate = self(input_ids_BT, prompt=prompt_nd, answer=answer_B).float()
            try:
                shared = self(
                    input_ids_BT, prompt=prompt_nd, answer=answer_B, share_prompt=True
                ).float()
            except (TypeError, AttributeError):
                # The forward takes no extra arguments, or the attention has no layer index.
                return False
        return agree(shared, separate)

    @cached_property
    def keeps_prefix(self) -> bool:
        """Whether the keys and values of a prompt may replace the prompt.

        A trial run finds out, because models with recurrent layers keep other states, and some
        families ignore a cache. All ranks of a sharded model must call it together.
        """
        if self.masked:
            return False
        with self._trial():
            input_ids_BT, answer_B, prompt_nd = self._trial_inputs()
            expected = self(input_ids_BT, prompt=prompt_nd, answer=answer_B).float()
            try:
                prefix = self.prefix_of(prompt_nd)
                found = self(input_ids_BT, prefix=prefix, answer=answer_B).float()
            except (TypeError, ValueError, AttributeError, LookupError):
                return False
        return bool(prefix) and agree(found, expected)

    @contextmanager
    def _trial(self) -> Iterator[None]:
        """Run without gradients inside this context, and without what a trial does not ask for."""
        # A prefix in place of the prompt would make any two runs agree. Compiling takes a minute.
        uncompiled = torch.compiler.set_stance("force_eager")
        with torch.no_grad(), self.behind(None), uncompiled:
            yield

    def _trial_inputs(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return tokens [2, 4], their answers [2], and a prompt [3, d] for a trial run."""
        device = self.model.device
        input_ids_BT = torch.arange(4, 12, device=device).view(2, 4)
        prompt_nd = self.embed(torch.arange(12, 15, device=device))
        return input_ids_BT, torch.tensor([3, 2], device=device), prompt_nd

    @cached_property
    def ignores_left_padding(self) -> bool:
        """Whether generation answers a text alike behind masked padding, as a trial run finds out.

        Some recurrent layers read the padding. All ranks of a sharded model must call it together.
        """
        tokens = torch.arange(4, 8, device=self.model.device)
        one_token = GenerationConfig(
            max_new_tokens=1,
            do_sample=False,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
        found = []
        for padding in (0, 3):
            embeddings = self.embed(torch.cat([tokens[:padding], tokens]))[None]
            mask = torch.ones(embeddings.shape[:2], dtype=torch.long, device=tokens.device)
            mask[:, :padding] = 0
            # pyrefly: ignore[not-callable] - a method of every model with a causal head
            written = self.model.generate(
                inputs_embeds=embeddings, attention_mask=mask, generation_config=one_token
            )
            found.append(written.logits[0].float())
        return agree(found[1], found[0])

    @cached_property
    def differentiates_prefix(self) -> bool:
        """Whether `prefix_with_product` runs on this model, as a trial run of one vector says."""
        vector = torch.zeros(1, self.width, device=self.model.device)
        try:
            prefix, product = self.prefix_with_product(vector)
            product(tuple(part.unsqueeze(0) for part in prefix))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            return False
        return True

    # The parts of a forward pass.

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return the input embeddings [..., d] of tokens."""
        embeddings: torch.Tensor = self.model.get_input_embeddings()(input_ids)
        return embeddings

    def embed_behind(self, prompt: torch.Tensor | None, input_ids: torch.Tensor) -> torch.Tensor:
        """Return the input embeddings [B, n+T, d] of texts [B, T] behind a prompt.

        Args:
            prompt: soft prompt [n, d], or [B, n, d] with one prompt for each text; None for none.
            input_ids: [B, T].
        """
        embeddings = self.embed(input_ids)
        if prompt is None:
            return embeddings
        prompt_Bnd = prompt.to(embeddings.dtype).expand(len(input_ids), -1, -1)
        return torch.cat([prompt_Bnd, embeddings], dim=1)

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits [..., V] of hidden states [..., d]."""
        return self.capped(self.head_module(hidden))

    def head_of(self, tokens: Sequence[int]) -> Logits:
        """Return a function from hidden states [..., d] to the logits [..., K] of K tokens alone.

        If the head is one matrix, only the rows of these tokens are used. A sharded head is
        gathered here, once, so all ranks must call this together.
        """
        head = self.head_module
        if not isinstance(head, nn.Linear):
            return lambda hidden: self.head(hidden)[..., list(tokens)]
        with gathered(head):
            rows = torch.tensor(tokens, device=head.weight.device)
            weight = head.weight[rows]
            bias = None if head.bias is None else head.bias[rows]
        return lambda hidden: self.capped(_row_by_row(hidden, weight, bias))

    def capped(self, logits: torch.Tensor) -> torch.Tensor:
        """Apply the soft cap to logits, if there is one."""
        cap = self.logit_cap
        if cap is None:
            return logits
        return cap * torch.tanh(logits / cap)

    def prefix_of(self, prompt_nd: torch.Tensor) -> list[torch.Tensor]:
        """Return the keys and values of a prompt, layer by layer, each [1, heads, n, head width].

        In a causal model they do not depend on later tokens. So they are computed once for all
        examples of a step.
        """
        cache: Any = DynamicCache()
        embeddings = prompt_nd.to(self.model.dtype)[None]
        self.model.base_model(inputs_embeds=embeddings, cache=cache, use_cache=True)
        prefix = []
        for layer in cache.layers:
            prefix += [layer.keys, layer.values]
        return prefix

    def prefix_with_product(
        self, prompt_nd: torch.Tensor
    ) -> tuple[tuple[torch.Tensor, ...], PrefixProduct]:
        """Return a prompt's prefix, and the product that carries its gradients to the prompt.

        Raises:
            RuntimeError: the model has operations that PyTorch refuses here, so it does not
                `differentiates_prefix`.
        """
        # PyTorch repeats the backward pass of fused attention for each example of a batched
        # product.
        with self.plain_attention():
            # pyrefly: ignore[bad-unpacking]
            prefix, product = func.vjp(lambda prompt: tuple(self.prefix_of(prompt)), prompt_nd)
        return prefix, func.vmap(product)

    @contextmanager
    def behind(self, prefix: Sequence[torch.Tensor] | None) -> Iterator[None]:
        """Put keys and values before every text inside this context, in place of any prompt.

        Args:
            prefix: as `prefix_of` returns it, or expanded to the examples of a batch; None for the
                model as it is.
        """
        before = self._in_place
        self._in_place = prefix
        try:
            yield
        finally:
            self._in_place = before

    @property
    def has_prefix(self) -> bool:
        """Whether keys and values stand before every text, as inside `behind`."""
        return self._in_place is not None

    def new_cache(self, count: int) -> DynamicCache:
        """Return a cache with the keys and values of `behind` for each of `count` examples."""
        return _cache_of(self._in_place or [], count)

    @contextmanager
    def plain_attention(self) -> Iterator[None]:
        """Run attention as matrix products inside this context, if the family allows a choice."""
        fused = str(self.model.config._attn_implementation)
        if not self.takes_packing or fused == PACKABLE["eager"]:
            yield
            return
        self.model.set_attn_implementation(PACKABLE["eager"])
        try:
            yield
        finally:
            self.model.set_attn_implementation(fused)

    def checkpoint_activations(self) -> None:
        """Turn on activation checkpointing: keep each layer's inputs, and recompute the rest.

        The last layer is excluded, because the hooks on its MLP are gone in the backward pass. The
        checkpointing of transformers needs layers in training mode, in which some families apply
        dropout. In evaluation mode nothing is random, so recomputing gives the same values.
        """
        for layer in self.layers[:-1]:
            layer.forward = partial(
                checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False
            )

    def forward(  # noqa: PLR0913 - DeepSpeed's hooks run only in forward, so every use calls it
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        prompt: torch.Tensor | None = None,
        answer: torch.Tensor | None = None,
        prefix: Sequence[torch.Tensor] | None = None,
        *,
        share_prompt: bool = False,
        position_ids: torch.Tensor | None = None,
        tokens: Sequence[int] | None = None,
        beside: torch.Tensor | None = None,
        layers: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """Run the trunk, and the head at the answer positions if `answer` is given.

        Args:
            input_ids: [B, T], padded on the right.
            attention_mask: [B, T]; None when nothing is padded. A causal model does not need it,
                because its real tokens never attend to padding on the right.
            prompt: soft prompt [n, d] before every example, or [B, n, d] with one prompt for each
                example. It does not run inside `behind`.
            answer: [B], the position of each example's answer, counted without the prompt.
            prefix: keys and values from `prefix_of` in place of a prompt, shared or expanded to B
                examples.
            share_prompt: run `prompt` once for all its examples (see `shared_prompt.py`). It may
                then be [G, n, d], where each prompt is for one of G equal parts of the examples, in
                order. This needs `answer` and a causal model that `shares_prompt`.
            position_ids: [B, T], for a causal model without a prompt. Where positions start again,
                a new document starts, which does not attend to the one before.
            tokens: return the logits of these K tokens only; None for all V.
            beside: hidden states [M, d] of earlier answers. Their logits are also returned, so that
                a sharded head is gathered only once.
            layers: at the answers, return the hidden states behind these layers in place of logits.
                They are counted from 0 and rise. The last one's have passed the last norm.

        Returns:
            Without `answer`, the trunk's last hidden states [B, n+T, d], or [B, T, d] with a
            prefix. With `answer`, the logits [B+M, V] or [B+M, K] at the answers. With `layers`,
            the hidden states [B+M, len(layers) d] there, in their order.

        Raises:
            InputError: the outputs of the layers cannot be read.
        """
        # A caller need not know that its prompt has become a prefix.
        if self._in_place is not None:
            prompt, prefix, share_prompt = None, self._in_place, False
        if answer is None:
            inputs = self._inputs(input_ids, attention_mask, prompt, prefix)
            if position_ids is not None:
                inputs["position_ids"] = position_ids
            return self._trunk(inputs)

        read = [len(self.layers) - 1] if layers is None else layers
        if share_prompt and prompt is not None:
            hidden_Bd = self._at_answers_of_packed(input_ids, prompt, answer, read)
        else:
            inputs = self._inputs(input_ids, attention_mask, prompt, prefix)
            rows_B = torch.arange(len(answer), device=answer.device)
            num_virtual_tokens = 0 if prompt is None else prompt.shape[-2]
            hidden_Bd = self._at_answers(inputs, rows_B, answer + num_virtual_tokens, read)

        if beside is not None:
            hidden_Bd = torch.cat([hidden_Bd, beside])
        if layers is not None:
            return hidden_Bd
        return self.head(hidden_Bd) if tokens is None else self.head_of(tokens)(hidden_Bd)

    def _trunk(self, inputs: dict[str, Any]) -> torch.Tensor:
        """Return the last hidden states of the trunk."""
        return cast(torch.Tensor, self.model.base_model(**inputs).last_hidden_state)

    def _at_answers(
        self,
        inputs: dict[str, Any],
        rows_B: torch.Tensor,
        places_B: torch.Tensor,
        layers: Sequence[int],
    ) -> torch.Tensor:
        """Return the hidden states [B, len(layers) d] at a position of each example.

        Those of the last layer are the trunk's, behind its last norm.
        """
        last = len(self.layers) - 1
        lower = [self.layers[layer] for layer in layers if layer != last]
        mlp = families.mlp_of(self.layers[last])
        with run_at(mlp, rows_B, places_B), outputs_at(lower, rows_B, places_B) as states:
            of_trunk = self._trunk(inputs)
        if last in layers:
            states.append(of_trunk[rows_B, places_B])
        return torch.cat(states, dim=-1)

    def _at_answers_of_packed(
        self,
        input_ids: torch.Tensor,
        prompt: torch.Tensor,
        answer: torch.Tensor,
        layers: Sequence[int],
    ) -> torch.Tensor:
        """Return the hidden states [B, len(layers) d] of examples that share G prompts."""
        prompts_Gnd = prompt.view(-1, *prompt.shape[-2:])
        groups = len(prompts_Gnd)
        packing = Packing(
            num_virtual_tokens=prompt.shape[-2],
            rows=len(input_ids) // groups,
            length=input_ids.shape[1],
            answers_GB=answer.view(groups, -1),
        )
        inputs = self._packed_inputs(input_ids, prompts_Gnd, packing)
        groups_B = packing.groups_GB.flatten()
        return self._at_answers(inputs, groups_B, packing.places_GB.flatten(), layers)

    def _inputs(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        prompt: torch.Tensor | None,
        prefix: Sequence[torch.Tensor] | None,
    ) -> dict[str, Any]:
        """Return the keyword arguments of the trunk."""
        embeddings = self.embed_behind(prompt, input_ids)
        inputs: dict[str, Any] = {"inputs_embeds": embeddings}
        if not self.masked:
            return inputs | self._cache(prefix, len(input_ids))
        if attention_mask is not None:
            # Every token attends to the prompt.
            num_virtual_tokens = embeddings.shape[1] - attention_mask.shape[1]
            ones = attention_mask.new_ones(len(input_ids), num_virtual_tokens)
            inputs["attention_mask"] = torch.cat([ones, attention_mask], dim=1)
        return inputs

    def _packed_inputs(
        self, input_ids: torch.Tensor, prompts_Gnd: torch.Tensor, packing: Packing
    ) -> dict[str, Any]:
        """Return the trunk arguments for packed sequences [G, S] of a prompt and its examples."""
        embeddings_BTd = self.embed(input_ids)
        texts = embeddings_BTd.view(len(prompts_Gnd), -1, self.width)
        return {
            "inputs_embeds": torch.cat([prompts_Gnd.to(texts.dtype), texts], dim=1),
            "position_ids": packing.position_ids_S[None],
            # transformers does not change a mask of four dimensions. Our attention never reads it.
            "attention_mask": texts.new_empty(1, 1, 1, 1),
            "use_cache": False,
            "packing": packing,
        }

    def _cache(self, prefix: Sequence[torch.Tensor] | None, count: int) -> dict[str, Any]:
        """Return the trunk arguments that put a prefix before each of `count` examples."""
        if prefix is None:
            return {"use_cache": False}
        return {"cache": _cache_of(prefix, count), "use_cache": True}


def _cache_of(prefix: Sequence[torch.Tensor], count: int) -> DynamicCache:
    """Return a cache that holds a prefix for each of `count` examples."""
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(zip(prefix[::2], prefix[1::2], strict=True)):
        keys_of_all = keys.expand(count, -1, -1, -1)
        values_of_all = values.expand(count, -1, -1, -1)
        cache.update(keys_of_all, values_of_all, layer)
    return cache


def _row_by_row(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Return the linear layer of hidden states [..., d] and a weight [K, d] with few rows.

    A matrix product with so few columns rounds a row by its place in the batch on some processors.
    Private tuning needs examples that do not change each other.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    products = hidden.to(wide).unsqueeze(-2) * weight.to(wide)
    logits = products.sum(-1)
    if bias is not None:
        logits = logits + bias.to(wide)
    return logits.to(hidden.dtype)
