"""The Qwen2 decoder (arXiv 2407.10671): grouped-query attention, rotary positions, gated MLP, RMS norms. Llama's is the
same without biases.

It starts from embeddings, so that a multimodal family can place image features among them, and stops at hidden
states: head and loss are separate methods, applied to the positions that need logits.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax import Array
from jax.typing import DTypeLike

from mars_jax.models.attention import attention, causal
from mars_jax.models.configs import TextConfig
from mars_jax.models.head import frozen_head_losses
from mars_jax.models.layers import ACTIVATIONS, SCAN_UNROLL, STACKED, Dense, RMSNorm, rematerialised, rotate
from mars_jax.runtime.trees import Tree


class Layout(NamedTuple):
    """Where the tokens of a sequence stand, when that isn't one after the other.

    Attributes:
        positions: int32 [B, T], or [B, T, 3] for a decoder with `mrope_section`: rotary positions.
        segments: int32 [B, T]: 0 a beginning that all see, k >= 1 one of several ways to go on, which sees the
            beginning and itself, -1 padding; None where a token sees all before it.
    """

    positions: Array
    segments: Array | None = None


class Cache(NamedTuple):
    """What attention keeps of B sequences that grow, in C places; the next token of each comes to the same place.

    Attributes:
        keys: [L, B, C, G, head], turned by their rotary positions.
        values: [L, B, C, G, head].
        segments: int32 [B, C], as in `Layout`; places that are still free have theirs already.
        used: int32 [], places that are taken, the first ones.
    """

    keys: Array
    values: Array
    segments: Array
    used: Array

    def write(self, layer: Array | int, key: Array, value: Array) -> "Cache":
        """The cache with keys and values [B, S, G, head] of a layer in the next S places; `used` is left as it is."""
        # In a loop that carries the cache, nothing is copied.
        place = (layer, 0, self.used, 0, 0)
        return self._replace(
            keys=jax.lax.dynamic_update_slice(self.keys, key[None], place),
            values=jax.lax.dynamic_update_slice(self.values, value[None], place),
        )


def rotary_angles(config: TextConfig, positions: Array) -> Array:
    """Angles float32 [B or 1, T, head / 2] of rotary positions [B or 1, T] or, by `mrope_section`, [B or 1, T, 3]."""
    frequencies = rotary_frequencies(config)
    if config.mrope_section is None:
        places = positions[:, :, None]
    else:
        if positions.ndim == 2:  # text alone: all axes go on together
            positions = jnp.broadcast_to(positions[:, :, None], (*positions.shape, len(config.mrope_section)))
        axes = np.repeat(np.arange(len(config.mrope_section)), config.mrope_section)
        places = positions[:, :, axes]
    return places.astype(jnp.float32) * frequencies[None, None, :]


def rotary_frequencies(config: TextConfig) -> Array:
    """Angle per position of each pair of numbers of a head, float32 [head / 2]."""
    frequencies = config.rope_theta ** -(jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    scaled = frequencies / scaling.factor
    if scaling.kind == "linear":
        return scaled
    turns = scaling.original_length * frequencies / (2 * np.pi)
    kept = jnp.clip((turns - scaling.low) / (scaling.high - scaling.low), 0.0, 1.0)
    return (1 - kept) * scaled + kept * frequencies


def take_positions(x: Array, positions: Array) -> Array:
    """Rows of x [B, T, ...] at positions [B, S]: [B, S, ...]."""
    return jnp.take_along_axis(x, positions.reshape(*positions.shape, *(1,) * (x.ndim - 2)), axis=1)


def causal_visibility(length: int, positions: Array | None, layout: Layout | None) -> Array:
    """Which of T keys each query sees, bool [B or 1, S, T]: none after itself, and none of another segment."""
    visible = causal(length) if positions is None else jnp.arange(length)[None, None, :] <= positions[:, :, None]
    if layout is None or layout.segments is None:
        return visible
    of_key = layout.segments
    of_query = of_key if positions is None else take_positions(of_key, positions)
    return visible & ((of_key == 0)[:, None, :] | (of_key[:, None, :] == of_query[:, :, None]))


class SelfAttention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    config: TextConfig

    @nn.compact
    def __call__(
        self,
        x: Array,
        positions: Array | None = None,
        layout: Layout | None = None,
        cache: Cache | None = None,
        layer: Array | int = 0,
    ) -> tuple[Array, Cache | None]:
        """See `DecoderLayer`."""
        config = self.config
        places = jnp.arange(x.shape[1])[None] if layout is None else layout.positions
        asking, of_query = x, places
        if positions is not None:
            asking = take_positions(x, positions)
            of_query = positions if layout is None else take_positions(places, positions)
        bias = config.attention_bias
        query = Dense(config.num_heads * config.head_dim, bias, name="q_proj")(asking)
        key = Dense(config.num_kv_heads * config.head_dim, bias, name="k_proj")(x)
        value = Dense(config.num_kv_heads * config.head_dim, bias, name="v_proj")(x)
        query, key, value = (y.reshape(*y.shape[:2], -1, config.head_dim) for y in (query, key, value))
        query = rotate(query, rotary_angles(config, of_query))
        key = rotate(key, rotary_angles(config, places))
        if cache is None:
            is_causal = positions is None and (layout is None or layout.segments is None)
            visible = None if is_causal else causal_visibility(x.shape[1], positions, layout)
        else:
            is_causal = False
            cache = cache.write(layer, key, value)
            key, value = cache.keys[layer], cache.values[layer]
            visible = causal_visibility(key.shape[1], cache.used + jnp.arange(x.shape[1])[None], layout)
        mixed = attention(query, key, value, visible, is_causal=is_causal)
        return Dense(config.hidden_size, use_bias=False, name="o_proj")(mixed), cache


class Mlp(nn.Module):
    """The gated feed-forward block."""

    config: TextConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps x [B, T, D] to [B, T, D]."""
        width = self.config.intermediate_size
        gate = ACTIVATIONS[self.config.activation](Dense(width, use_bias=False, name="gate_proj")(x))
        return Dense(self.config.hidden_size, use_bias=False, name="down_proj")(
            gate * Dense(width, use_bias=False, name="up_proj")(x)
        )


class DecoderLayer(nn.Module):
    """A pre-norm transformer layer, in the carry form of `nn.scan`."""

    config: TextConfig

    @nn.compact
    def __call__(
        self,
        x: Array,
        positions: Array | None,
        layout: Layout | None = None,
        cache: Cache | None = None,
        layer: Array | int = 0,
    ) -> tuple[Array, Cache | None]:
        """Maps x [B, T, D] to ([B, T, D], None), or to [B, S, D]: the outputs at positions [B, S].

        With a cache, x are tokens that come to its next places and see what it holds, and None is the cache with their
        keys and values of this `layer`. Then `layout` has the positions of these tokens and the segments of the cache.
        """
        eps = self.config.rms_norm_eps
        normal = RMSNorm(eps, name="input_layernorm")(x)
        mixed, cache = SelfAttention(self.config, name="self_attn")(normal, positions, layout, cache, layer)
        x = (x if positions is None else take_positions(x, positions)) + mixed
        x = x + Mlp(self.config, name="mlp")(RMSNorm(eps, name="post_attention_layernorm")(x))
        return x, cache


class Qwen2Decoder(nn.Module):
    """Token embedding, decoder layers stacked by `nn.scan`, final norm, and a tied or untied head.

    Attributes:
        config: the architecture.
        remat: see `layers.rematerialised`; it concerns `hidden_at`, which training goes through.
    """

    config: TextConfig
    remat: str = "none"

    def setup(self) -> None:
        """Declares the parts; `lm_head` exists only where it is not the embedding."""
        config = self.config
        self.embed_tokens = nn.Embed(config.vocab_size, config.hidden_size, embedding_init=nn.initializers.normal(0.02))
        self.layers = nn.scan(
            DecoderLayer,
            variable_axes=STACKED,
            in_axes=nn.broadcast,
            split_rngs={"params": True},
            length=config.num_layers,
            unroll=SCAN_UNROLL,
        )(config)
        self.norm = RMSNorm(config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = Dense(config.vocab_size, use_bias=False)

    def embed(self, tokens: Array) -> Array:
        """Maps token ids [B, T] to embeddings [B, T, D]."""
        return jnp.take(self.embed_tokens.embedding, tokens, axis=0)

    def hidden(self, embeddings: Array, layout: Layout | None = None) -> Array:
        """Maps embeddings [B, T, D] to final hidden states [B, T, D]. Padding belongs on the right."""
        x, _ = self.layers(embeddings, None, layout)
        return self.norm(x)

    def hidden_at(self, embeddings: Array, positions: Array, layout: Layout | None = None) -> Array:
        """Final hidden states [B, S, D] at positions [B, S]; the last layer works for those positions only."""
        if self.is_initializing():
            return take_positions(self.hidden(embeddings, layout), positions)
        layer = rematerialised(DecoderLayer, self.remat)(self.config, parent=None)
        count = self.config.num_layers
        variables = self.layers.variables
        base, adapters = variables["params"], _without_params(variables)

        def body(x: Array, place: tuple[Array, Tree]) -> tuple[Array, None]:
            # Frozen weights are indexed where they lie: a slice of them would be a copy of the base.
            weights = jax.tree.map(lambda leaf: jnp.asarray(leaf)[place[0]], base)
            return layer.apply({"params": weights, **place[1]}, x, None, layout)  # type: ignore[return-value]

        first = jnp.arange(count - 1), jax.tree.map(lambda leaf: leaf[:-1], adapters)
        x, _ = jax.lax.scan(body, embeddings, first, unroll=SCAN_UNROLL)
        x, _ = layer.apply(jax.tree.map(lambda leaf: leaf[-1], dict(variables)), x, positions, layout)
        return self.norm(x)

    def empty_cache(self, segments: Array, dtype: DTypeLike) -> Cache:
        """A cache with a place for each of `segments` int32 [B, C]."""
        config = self.config
        shape = (config.num_layers, *segments.shape, config.num_kv_heads, config.head_dim)
        return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), segments, jnp.int32(0))

    def extend(self, embeddings: Array, positions: Array, cache: Cache) -> tuple[Array, Cache]:
        """Final hidden states [B, S, D] of tokens that come to the next places of a cache, and the cache with them.

        Args:
            embeddings: [B, S, D], of the tokens.
            positions: rotary positions of the tokens, as in `Layout`.
            cache: what came before.
        """
        layer = DecoderLayer(self.config, parent=None)
        variables = self.layers.variables
        layout = Layout(positions, cache.segments)

        def body(carry: tuple[Array, Cache], place: tuple[Array, Tree]) -> tuple[tuple[Array, Cache], None]:
            number, of_layer = place
            x, cache = carry
            extended: Any = layer.apply(of_layer, x, None, layout, cache, number)
            return extended, None

        places = jnp.arange(self.config.num_layers), dict(variables)
        # Not unrolled: on CPU it compiles in half the time, and steps take no longer.
        (x, cache), _ = jax.lax.scan(body, (embeddings, cache), places)
        return self.norm(x), cache._replace(used=cache.used + embeddings.shape[1])

    def head(self, hidden: Array) -> Array:
        """Maps hidden states [..., D] to float32 logits [..., V]."""
        if self.config.tie_word_embeddings:
            logits = hidden @ self.embed_tokens.embedding.astype(hidden.dtype).T
        else:
            logits = self.lm_head(hidden)
        return logits.astype(jnp.float32)

    def losses(self, hidden: Array, targets: Array, weights: Array) -> Array:
        """Weighted cross-entropies of hidden states [N, D] with targets [N], nats, float32 [N]."""
        if self.config.tie_word_embeddings:
            return frozen_head_losses(hidden, self.embed_tokens.embedding.T, targets, weights)
        if self.lm_head.adapter():
            losses = optax.softmax_cross_entropy_with_integer_labels(self.head(hidden), targets)
            return losses * weights
        return frozen_head_losses(hidden, self.lm_head.get_variable("params", "kernel"), targets, weights)


def _without_params(variables: Mapping[str, Mapping[str, Any]]) -> Tree:
    """The collections of adapters."""
    return {name: tree for name, tree in variables.items() if name != "params"}
