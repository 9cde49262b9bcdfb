"""The MSA model: a decoder-only backbone whose routing layers attend to selected documents.

Data flow of one forward pass, per layer (paper 3.2):

1. the backbone's projections give queries, keys and values; keys and queries are rotated;
2. in a routing layer, the router projects routing queries from the same input, the memory is asked
   for this layer's top-k documents and for their compressed keys and values (Eq. 2, 3);
3. attention over [memory rows; local tokens] (Eq. 4); the prefix sees no memory.

Stage 1 (`encode_documents`) runs the same layers over documents and keeps, per routing layer, the
pooled keys, pooled values and routing keys (Eq. 1). With no memory the model is the backbone.

Shapes: B batch, T tokens, N documents, L document tokens, C chunks, H query heads, G KV heads,
D head dim, E hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from msa.errors import ConfigError, InputError
from msa.model.backbones import Backbone, get_backbone
from msa.model.cache import MSACache
from msa.model.configuration_msa import MSAConfig
from msa.ops.attention import BatchRow, attend, local_mask, memory_mask_of, rows_alone
from msa.ops.pooling import chunk_counts, pool_chunks
from msa.ops.routing import normalize, reduce_queries, token_weights
from msa.types import Content, LatentStates, LayerStates, MemoryReader, Selection

# transformers 5.24 renamed the cache of `generate()` and of outputs.
CACHE_NAME = (
    "cache" if "cache" in {f.name for f in fields(CausalLMOutputWithPast)} else "past_key_values"
)


@dataclass
class MSAOutput(CausalLMOutputWithPast):
    """Output of `MSAForCausalLM.forward`.

    Attributes:
        selections: routing layer -> the documents that it selected at this prefill.
    """

    selections: dict[int, Selection] | None = None


class Step:
    """What the layers of one forward pass share.

    No dataclass: FSDP2 hands layers copies of those, and results stored in a copy would be lost.

    Attributes:
        mask: [B or 1, T, S] bool over local keys; None for plain causal attention.
        cache: local keys and values so far; None in training and in stage 1.
        memory, routing_mask, memory_mask: arguments of `MSAForCausalLM.forward`.
        lengths: [N] int64 in stage 1, when the batch holds documents; else None.
        rows: of the batch, each of which attends by itself; None where they do so together.
        twice: the batch is one token, which goes through the products of the layers twice.
        states: stage 1 fills this.
        selections: routing fills this.
    """

    def __init__(
        self,
        mask: Tensor | None = None,
        cache: MSACache | None = None,
        memory: MemoryReader | None = None,
        routing_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        lengths: Tensor | None = None,
        rows: Sequence[BatchRow] | None = None,
        twice: bool = False,
    ) -> None:
        self.mask, self.cache, self.rows, self.twice = mask, cache, rows, twice
        self.memory, self.routing_mask, self.memory_mask = memory, routing_mask, memory_mask
        self.lengths = lengths
        self.states: dict[int, LayerStates] = {}
        self.selections: dict[int, Selection] = {}
        self._is_closed = False

    def keep_states(self, layer: int, states: LayerStates) -> None:
        """Take what documents leave in a layer."""
        if not self._is_closed:
            self.states[layer] = states

    def keep_selection(self, layer: int, selection: Selection) -> None:
        """Take what a layer selected."""
        if not self._is_closed:
            self.selections[layer] = selection

    def close(self) -> None:
        """Release what was kept, and take no more.

        Layers whose activations are computed again in a backward pass run once more, with this
        object. Were their results kept here, so would be their graphs, and the hooks of those keep
        this object: a cycle that Python cannot see, and so never frees.
        """
        self.states, self.selections, self._is_closed = {}, {}, True


class TokenWeight(nn.Linear):
    """Logarithm of a routing token's weight in the pooled query; zeros weigh all tokens equally."""


class MSAAttention(nn.Module):
    """The backbone's attention, with a router where the layer routes.

    It holds the backbone attention's own modules under their own names, so that checkpoints keep
    theirs; the router's are `router_q_proj.0` and `router_k_proj.0` as in the released model.
    """

    def __init__(self, config: MSAConfig, layer_index: int, backbone: Backbone, inner: nn.Module):
        super().__init__()
        for name, module in inner.named_children():
            self.add_module(name, module)
        self.config = config
        self.backbone = backbone
        self.layer_index = layer_index
        self.head_dim: int = config.head_dim
        self.scaling = self.head_dim**-0.5
        self.routes = layer_index in (config.routing_layers or [])
        if self.routes:
            heads, groups = config.num_attention_heads, config.num_key_value_heads or 0
            size, dim = config.hidden_size, self.head_dim
            self.router_q_proj = nn.Sequential(nn.Linear(size, heads * dim, bias=False))
            self.router_k_proj = nn.Sequential(nn.Linear(size, groups * dim, bias=False))
            if config.query_reduction == "pooled":
                self.router_token_weight = TokenWeight(size, 1, bias=False)

    def project(
        self, hidden: Tensor, position_embeddings: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries [B, T, H, D], rotated keys and values [B, T, G, D]."""
        queries, keys, values = self.backbone.project(self, hidden)
        queries, keys = self.backbone.rotate(queries, keys, *position_embeddings, unsqueeze_dim=2)
        return queries, keys, values

    def compress(
        self, hidden: Tensor, keys: Tensor, values: Tensor, lengths: Tensor
    ) -> LayerStates:
        """Latent states of documents in this layer.

        Args:
            hidden: [N, L, E], input of the attention block after its norm.
            keys: [N, L, G, D], rotated. values: [N, L, G, D].
            lengths: [N] int64.

        Source: MSA 3.2.1, Eq. 1. Keys are pooled after RoPE; routing keys have no RoPE and no
        norm, and are brought to unit length after pooling (cosine).
        """
        size = self.config.chunk_size
        router_keys = self.router_k_proj(hidden).unflatten(-1, (-1, self.head_dim))
        routing_keys = pool_chunks(router_keys, lengths, size)
        if self.config.routing_score == "cosine":
            routing_keys = normalize(routing_keys)
        pooled_keys = pool_chunks(keys, lengths, size)
        return LayerStates(pooled_keys, pool_chunks(values, lengths, size), routing_keys)

    def routing_vectors(self, hidden: Tensor, routing_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors [B, S, G*D] float32 that this layer searches with, and their mask [B, S].

        Args:
            hidden: [B, T, E], input of the attention block after its norm.
            routing_mask: [B, T] bool.

        Source: MSA 3.2.1, Eq. 2; S and the reductions are those of `ops.routing.reduce_queries`.
        """
        config = self.config
        queries = self.router_q_proj(hidden).unflatten(-1, (-1, self.head_dim))
        weights = None
        if config.query_reduction == "pooled":
            weights = token_weights(self.router_token_weight(hidden)[..., 0])
        return reduce_queries(
            queries,
            routing_mask,
            config.num_key_value_heads or 0,
            config.routing_score,
            config.query_reduction,
            weights,
        )

    def recall(self, hidden: Tensor, step: Step) -> Content | None:
        """Content of the documents that this layer selected, routing if it has not yet.

        Source: MSA 3.2.1, Eq. 2 and 3.
        """
        cache, layer = step.cache, self.layer_index
        if cache is not None and layer in cache.contents:
            return cache.contents[layer]
        if step.memory is None or step.routing_mask is None:
            return None
        selection = step.memory.route(layer, *self.routing_vectors(hidden, step.routing_mask))
        content = step.memory.content(layer, selection)
        step.keep_selection(layer, selection)
        if cache is not None:
            cache.remember(layer, selection, content)
        return content

    def attend(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        mask: Tensor | None,
        content: Content | None,
        memory_mask: Tensor | None,
    ) -> Tensor:
        """[B, T, H, D]: attention to the documents that were selected and to local tokens.

        Source: MSA 3.2.1, Eq. 3 and 4.
        """
        if content is not None:
            if mask is None:
                mask = local_mask(queries.shape[1], None, keys.shape[1], keys.device)
            mask = memory_mask_of(mask, content, memory_mask)
            keys = torch.cat([content.keys.to(keys.dtype), keys], dim=1)
            values = torch.cat([content.values.to(values.dtype), values], dim=1)
        return attend(queries, keys, values, mask, self.scaling)

    def attend_alone(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        rows: Sequence[BatchRow],
        content: Content | None,
        memory_mask: Tensor | None,
    ) -> Tensor:
        """[B, T, H, D]: the same, to the last bit as if every row of the batch were alone."""
        out = torch.zeros_like(queries)
        if queries.shape[1] == 1:  # as `ops.attention.attend` takes them, once for all rows
            keys, values = keys.float(), values.float()
        for i, row in enumerate(rows):
            if not row.tokens:
                continue
            part, last = slice(i, i + 1), slice(-row.tokens, None)
            out[part, last] = self.attend(
                queries[part, last],
                keys[part][:, row.keys],
                values[part][:, row.keys],
                row.mask,
                None if content is None else content.row(i),
                None if memory_mask is None else memory_mask[part, last],
            )
        return out

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        step: Step,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """Attention output [B, T, E] for hidden states [B, T, E]."""
        queries, keys, values = self.project(hidden_states, position_embeddings)
        if step.twice:
            hidden_states, queries = hidden_states[:1], queries[:1]
            keys, values = keys[:1], values[:1]
        content = None
        if self.routes and step.lengths is not None:
            states = self.compress(hidden_states, keys, values, step.lengths)
            step.keep_states(self.layer_index, states)
        elif self.routes:
            content = self.recall(hidden_states, step)
        if step.cache is not None:
            keys, values = (
                t.transpose(1, 2)
                for t in step.cache.update(
                    keys.transpose(1, 2), values.transpose(1, 2), self.layer_index
                )
            )
        out = (
            self.attend(queries, keys, values, step.mask, content, step.memory_mask)
            if step.rows is None
            else self.attend_alone(queries, keys, values, step.rows, content, step.memory_mask)
        )
        out = out.flatten(2)
        if step.twice:
            out = out.expand(2, -1, -1)
        return cast(nn.Module, self.o_proj)(out), None


class MSAPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation, as transformers does them."""

    config_class = MSAConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["cache", "past_key_values", "memory"]  # noqa: RUF012 (their convention)
    _supports_sdpa = True

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, TokenWeight):
            torch.nn.init.zeros_(module.weight)
            return
        super()._init_weights(module)
        if isinstance(module, MSAForCausalLM):
            torch.nn.init.constant_(module.temperature, self.config.aux_temperature)

    def checkpoint_activations(self, enable: bool = True) -> None:
        """Keep the inputs of the layers only, and compute the rest again in the backward pass."""
        self._set_gradient_checkpointing(enable)

    def _set_gradient_checkpointing(
        self,
        enable: bool = True,
        gradient_checkpointing_func: Callable[..., Any] = checkpoint,
        **options: Any,
    ) -> None:
        """All of transformers' ways to checkpoint activations end here.

        Raises:
            ConfigError: of the reentrant kind, which returns no gradients for what a layer leaves
                beside its output: pooled states and scores, and so for the routers.
        """
        given = getattr(gradient_checkpointing_func, "keywords", {})
        if enable and given.get("use_reentrant"):
            raise ConfigError(
                "use_reentrant=True: routers would get no gradients, in silence; leave it out, or "
                "give use_reentrant=False"
            )
        function = partial(gradient_checkpointing_func, use_reentrant=False)
        super()._set_gradient_checkpointing(enable, function, **options)


class MSAModel(MSAPreTrainedModel):
    """Embeddings, layers and final norm."""

    def __init__(self, config: MSAConfig) -> None:
        super().__init__(config)
        backbone = get_backbone(config.backbone)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        layers = []
        for index in range(config.num_hidden_layers):
            layer = backbone.decoder_layer(config, index)
            layer.self_attn = MSAAttention(config, index, backbone, cast(Any, layer).self_attn)
            layers.append(layer)
        self.layers = nn.ModuleList(layers)
        self.norm = backbone.norm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = backbone.rotary_embedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self, hidden: Tensor, position_ids: Tensor, step: Step, *, routing_only: bool = False
    ) -> Tensor:
        """Hidden states [B, T, E] after the final norm, for embedded tokens [B, T, E].

        With `routing_only` the forward ends as soon as the last routing layer has selected; what
        is returned has no meaning then.
        """
        position_embeddings = self.rotary_emb(hidden, position_ids)
        last = max(self.config.routing_layers, default=-1) if routing_only else None
        for index, layer in enumerate(self.layers):
            if index == last and not _is_sharded(layer):
                normed = cast(nn.Module, layer.input_layernorm)(hidden)
                cast(MSAAttention, layer.self_attn).recall(normed, step)
                return hidden
            hidden = layer(hidden, position_embeddings=position_embeddings, step=step)
            if index == last:
                return hidden
        return cast(Tensor, self.norm(hidden))

    def encode(
        self, input_ids: Tensor, lengths: Tensor, *, with_hidden: bool = False
    ) -> tuple[LatentStates, Tensor | None]:
        """Stage 1: run documents through the layers, each alone, positions from 0.

        Args:
            input_ids: [N, L] int64, right-padded.
            lengths: [N] int64, true tokens, all >= 1.
            with_hidden: also return hidden states [N, L, E] after the final norm (for a language
                model loss); otherwise the last layer stops after its keys and values.

        Source: MSA 3.2.1, Eq. 1; 3.2.2 (document-wise RoPE).
        """
        step = Step(lengths=lengths)
        try:
            hidden = self._encode_layers(input_ids, step, with_hidden)
            states = LatentStates(chunk_counts(lengths, self.config.chunk_size), step.states)
        finally:  # a recomputation ends as soon as it has what it needs, with an exception
            step.close()
        return states, self.norm(hidden) if with_hidden else None

    def _encode_layers(self, input_ids: Tensor, step: Step, with_hidden: bool) -> Tensor:
        """Run the layers that stage 1 needs; hidden states before the final norm."""
        hidden: Tensor = self.embed_tokens(input_ids)
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        position_embeddings = self.rotary_emb(hidden, positions)
        last = -1 if with_hidden else max(self.config.routing_layers, default=-1)
        for index, layer in enumerate(self.layers):
            if index == last and not _is_sharded(layer):
                attention = cast(MSAAttention, layer.self_attn)
                normed = cast(nn.Module, layer.input_layernorm)(hidden)
                _, keys, values = attention.project(normed, position_embeddings)
                assert step.lengths is not None
                states = attention.compress(normed, keys, values, step.lengths)
                step.keep_states(index, states)
                break
            hidden = layer(hidden, position_embeddings=position_embeddings, step=step)
            if index == last:
                step.keep_states(index, _with_output(step.states[index], hidden))
                break
        return hidden


def _is_sharded(layer: nn.Module) -> bool:
    """Whether FSDP2 shards the layer, whose parts cannot be run by themselves then."""
    return hasattr(layer, "set_requires_gradient_sync")


def _with_output(states: LayerStates, hidden: Tensor) -> LayerStates:
    """The same states, with a gradient of 0 for the layer's output: there FSDP2 waits for one."""
    return replace(states, pooled_keys=states.pooled_keys + 0 * hidden.sum())


class MSAForCausalLM(MSAPreTrainedModel, GenerationMixin):
    """A language model that routes over a memory.

    Example:
        >>> from msa import MSAConfig, MSAForCausalLM
        >>> config = MSAConfig(vocab_size=64, hidden_size=32, intermediate_size=64,
        ...     num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16)
        >>> MSAForCausalLM(config).config.routing_layers
        [1]
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: MSAConfig) -> None:
        super().__init__(config)
        self.model = MSAModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        # τ of Eq. 5, stored with the weights as in the released checkpoint; not trained.
        self.temperature = nn.Parameter(
            torch.tensor(float(config.aux_temperature)), requires_grad=False
        )
        self.post_init()

    def encode_documents(self, input_ids: Tensor, lengths: Tensor) -> LatentStates:
        """Stage 1: the latent states of documents in every routing layer.

        Args:
            input_ids: [N, L] int64, right-padded.
            lengths: [N] int64, true tokens of each document, all >= 1.

        Returns:
            LatentStates in the model's dtype. Differentiable unless under `torch.no_grad()`.
        """
        return self.model.encode(input_ids, lengths)[0]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        memory: MemoryReader | None = None,
        routing_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        routing_only: bool = False,
        past_key_values: Any = None,
        **_: Any,
    ) -> MSAOutput:
        """Run local tokens, with a memory or (without one) as the plain backbone.

        Args:
            input_ids: [B, T] int64, left-padded; or `inputs_embeds` [B, T, E].
            attention_mask: [B, S] 0 for padding; S counts the cached tokens too. None without
                padding; a step with a cache is cheaper then.
            position_ids: [B, T] int64; by default counted from the cache's length.
            cache: an `MSACache` to continue, or None.
            labels: [B, T] int64, -100 for tokens without a loss.
            use_cache: return a cache.
            logits_to_keep: compute logits for the last so many tokens only; 0 for all.
            memory: asked for documents in every routing layer, unless the cache holds some.
            routing_mask: [B, T] bool, tokens that route; by default all but the padding.
            memory_mask: [B, T] bool, tokens that see the memory; by default all.
            routing_only: end with the last routing layer's selection; there are no logits then.
            past_key_values: the name of `cache` in transformers before 5.24.

        Raises:
            InputError: `cache` is one that cannot hold memory.
        """
        hidden = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        tokens = hidden.shape[1]
        cache = past_key_values if cache is None else cache
        if cache is None and use_cache and not self.training:
            cache = MSACache()
        if cache is not None and not isinstance(cache, MSACache):
            raise InputError(
                f"The cache is {type(cache).__name__}: expected MSACache (msa.model.cache)"
            )
        past = cache.get_seq_length() if cache is not None else 0
        if position_ids is None:
            position_ids = torch.arange(past, past + tokens, device=hidden.device)[None]
        # Whether there is padding is looked at while prefilling only: it makes the CPU wait.
        if attention_mask is not None and not past and bool(attention_mask.all()):
            attention_mask = None
        exact = _is_exact(hidden)
        rows = _rows_alone(hidden, attention_mask, past) if exact else None
        twice = exact and hidden.shape[:2] == (1, 1)
        mask = None
        if rows is None and (attention_mask is not None or (past and tokens > 1)):
            mask = local_mask(tokens, attention_mask, past + tokens, hidden.device)
        if memory is not None and routing_mask is None:
            routing_mask = (
                attention_mask[:, -tokens:].bool()
                if attention_mask is not None
                else torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
            )
        step = Step(mask, cache, memory, routing_mask, memory_mask, rows=rows, twice=twice)
        if twice:
            hidden = hidden.expand(2, -1, -1)
        hidden = self.model(hidden, position_ids, step, routing_only=routing_only)
        if routing_only:
            return MSAOutput(selections=step.selections)
        logits = self.lm_head(hidden[:, -logits_to_keep:] if logits_to_keep else hidden)
        if twice:
            logits = logits[:1]
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100
            )
        kept = {CACHE_NAME: cache}
        return MSAOutput(loss=loss, logits=logits, selections=step.selections or None, **kept)

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, **kwargs: Any) -> Any:
        """Generate as transformers does (sampling, streaming, stopping), with or without a memory.

        Takes `memory`, `routing_mask`, `memory_mask` and `position_ids` of `forward` beside
        transformers' own arguments. To continue a context, pass its `MSACache` as `cache` and the
        ids of the whole sequence; documents are not chosen again. `MemoryEngine` does not use this:
        it decodes by `msa.inference.decoding`.
        """
        given = [kwargs.pop(name, None) for name in ("cache", "past_key_values")]
        cache = next((c for c in given if c is not None), None)
        if cache is None and kwargs.get("use_cache", True):
            cache = MSACache()
        return super().generate(inputs, **kwargs, **({} if cache is None else {CACHE_NAME: cache}))

    def prepare_inputs_for_generation(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As transformers does; masks over tokens are cut to the tokens that are fed."""
        masks = {name: kwargs.pop(name, None) for name in ("routing_mask", "memory_mask")}
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        tokens = inputs["input_ids"].shape[1]
        cache = inputs.get(CACHE_NAME)
        if cache is None or cache.get_seq_length() == 0:
            for name, mask in masks.items():
                inputs[name] = None if mask is None else _extended(mask, tokens, name)
        return inputs


def _is_exact(hidden: Tensor) -> bool:
    """Whether a row is answered to the last bit as it is alone, whoever shares the batch.

    On a CPU in bfloat16 a row of a matrix product is summed in one order whatever the other rows
    are, if there are two at least; attention over padded keys is not. So rows attend by themselves
    there, and a single token has company. In float32 the order depends on the number of rows.
    """
    low = hidden.dtype.itemsize < 4
    return low and hidden.device.type == "cpu" and not torch.is_grad_enabled()


def _rows_alone(hidden: Tensor, attention_mask: Tensor | None, past: int) -> list[BatchRow] | None:
    """What each row of a batch attends with; None where nothing is padded and nobody else there."""
    batch, tokens = hidden.shape[:2]
    if attention_mask is None:
        if batch == 1:
            return None
        attention_mask = torch.ones(batch, past + tokens, dtype=torch.long)
    return rows_alone(attention_mask, tokens)


def _extended(mask: Tensor, tokens: int, name: str) -> Tensor:
    """Cover generated tokens, when they are fed again for want of a cache."""
    missing = tokens - mask.shape[1]
    value = name == "memory_mask"  # generated tokens see the memory, and do not route
    return torch.cat([mask, mask.new_full((len(mask), missing), value)], dim=1)


AutoConfig.register("msa", MSAConfig, exist_ok=True)
AutoModelForCausalLM.register(MSAConfig, MSAForCausalLM, exist_ok=True)
