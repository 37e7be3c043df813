"""The Qwen2 decoder (arXiv 2407.10671): grouped-query attention, rotary positions, gated MLP, RMS norms.

It starts from embeddings, so that a multimodal family can place image features among them, and stops at hidden
states: the head is a separate method, applied to the positions that need logits.
"""

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from mars_jax.models.configs import TextConfig
from mars_jax.models.layers import ACTIVATIONS, SCAN_UNROLL, Dense, RMSNorm, attention


def rotary(x: Array, theta: float) -> Array:
    """Rotary position embedding (Su et al., arXiv 2104.09864), half-split layout, positions 0..T-1.

    Args:
        x: [B, T, H, head].
        theta: the base of the wavelengths.

    Returns:
        [B, T, H, head] in the dtype of x.
    """
    length, head_dim = x.shape[1], x.shape[3]
    frequencies = theta ** -(jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = jnp.arange(length, dtype=jnp.float32)[:, None] * frequencies[None, :]
    cos, sin = jnp.cos(angles)[None, :, None, :], jnp.sin(angles)[None, :, None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


class SelfAttention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    config: TextConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps x [B, T, D] to [B, T, D]."""
        config = self.config
        query = Dense(config.num_heads * config.head_dim, name="q_proj")(x)
        key = Dense(config.num_kv_heads * config.head_dim, name="k_proj")(x)
        value = Dense(config.num_kv_heads * config.head_dim, name="v_proj")(x)
        query, key, value = (y.reshape(*x.shape[:2], -1, config.head_dim) for y in (query, key, value))
        query, key = rotary(query, config.rope_theta), rotary(key, config.rope_theta)
        mixed = attention(query, key, value, causal=True)
        return Dense(config.hidden_size, use_bias=False, name="o_proj")(mixed)


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
    def __call__(self, x: Array, _: None) -> tuple[Array, None]:
        """Maps x [B, T, D] to ([B, T, D], None)."""
        eps = self.config.rms_norm_eps
        x = x + SelfAttention(self.config, name="self_attn")(RMSNorm(eps, name="input_layernorm")(x))
        x = x + Mlp(self.config, name="mlp")(RMSNorm(eps, name="post_attention_layernorm")(x))
        return x, None


class Qwen2Decoder(nn.Module):
    """Token embedding, decoder layers stacked by `nn.scan`, final norm, and a tied or untied head."""

    config: TextConfig

    def setup(self) -> None:
        """Declares the parts; `lm_head` exists only where it is not the embedding."""
        config = self.config
        self.embed_tokens = nn.Embed(config.vocab_size, config.hidden_size, embedding_init=nn.initializers.normal(0.02))
        self.layers = nn.scan(
            DecoderLayer,
            variable_axes={"params": 0, "lora": 0},
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

    def hidden(self, embeddings: Array) -> Array:
        """Maps embeddings [B, T, D] to final hidden states [B, T, D]. Padding belongs on the right."""
        x, _ = self.layers(embeddings, None)
        return self.norm(x)

    def head(self, hidden: Array) -> Array:
        """Maps hidden states [..., D] to float32 logits [..., V]."""
        if self.config.tie_word_embeddings:
            logits = hidden @ self.embed_tokens.embedding.astype(hidden.dtype).T
        else:
            logits = self.lm_head(hidden)
        return logits.astype(jnp.float32)
