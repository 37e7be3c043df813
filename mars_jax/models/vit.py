"""Vision transformers over tiles of one size, without pooling head.

SigLIP (arXiv 2303.15343), CLIP (arXiv 2103.00020) and DINOv2 (arXiv 2304.07193) differ in the settings of
`VisionConfig`. LLaVA uses hidden states before the last norm, so the last norm is not implemented.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from mars_jax.models.attention import attention
from mars_jax.models.configs import VisionConfig
from mars_jax.models.layers import ACTIVATIONS, SCAN_UNROLL, STACKED, Dense, LayerNorm, rematerialised


class SelfAttention(nn.Module):
    """Bidirectional multi-head attention."""

    config: VisionConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps x [B, P, D] to [B, P, D]."""
        width, heads = self.config.hidden_size, self.config.num_heads
        split = (*x.shape[:2], heads, width // heads)
        query = Dense(width, name="q_proj")(x).reshape(split)
        key = Dense(width, name="k_proj")(x).reshape(split)
        value = Dense(width, name="v_proj")(x).reshape(split)
        return Dense(width, name="out_proj")(attention(query, key, value))


class Mlp(nn.Module):
    """Two-layer feed-forward block."""

    config: VisionConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps x [B, P, D] to [B, P, D]."""
        hidden = ACTIVATIONS[self.config.activation](Dense(self.config.intermediate_size, name="fc1")(x))
        return Dense(self.config.hidden_size, name="fc2")(hidden)


class LayerScale(nn.Module):
    """A learned scale for each of D channels."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps x [B, P, D] to [B, P, D]."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        return x * scale[None, None].astype(x.dtype)


class EncoderLayer(nn.Module):
    """Pre-norm transformer layer, in the carry form of `nn.scan`."""

    config: VisionConfig
    keep: bool

    @nn.compact
    def __call__(self, x: Array, _: None) -> tuple[Array, Array | None]:
        """Maps x [B, P, D] to the carry [B, P, D], and the same as scan output if `keep`, else None."""
        eps, scaled = self.config.layer_norm_eps, self.config.kind == "dinov2"
        branch = SelfAttention(self.config, name="self_attn")(LayerNorm(eps, name="layer_norm1")(x))
        x = x + (LayerScale(name="layer_scale1")(branch) if scaled else branch)
        branch = Mlp(self.config, name="mlp")(LayerNorm(eps, name="layer_norm2")(x))
        x = x + (LayerScale(name="layer_scale2")(branch) if scaled else branch)
        return x, x if self.keep else None


class VisionTransformer(nn.Module):
    """Patch embedding, learned positions, and encoder layers stacked by `nn.scan`.

    Attributes:
        config: the architecture.
        feature_layers: indices of the hidden states to concatenate; 0 are the embeddings. Later layers are not applied.
        remat: see `layers.rematerialised`.
    """

    config: VisionConfig
    feature_layers: Sequence[int]
    remat: str = "none"

    @nn.compact
    def __call__(self, pixels: Array) -> Array:
        """Maps normalised pixels [B, 3, height, width] to hidden states [B, P, D * len(feature_layers)]."""
        config = self.config
        grid, patch = config.grid_size, config.patch_size
        # A convolution whose stride is its kernel is one matrix product over (channel, row, column) of each patch.
        patches = pixels[:, :, : grid * patch, : grid * patch].reshape(-1, 3, grid, patch, grid, patch)
        patches = patches.transpose(0, 2, 4, 1, 3, 5).reshape(-1, grid * grid, 3 * patch * patch)
        x = Dense(config.hidden_size, use_bias=config.kind != "clip_vision_model", name="patch_embed")(patches)
        initializer = nn.initializers.normal(0.02)
        if config.class_token:
            token = self.param("class_embed", initializer, (config.hidden_size,), jnp.float32)
            token = jnp.broadcast_to(token[None, None].astype(x.dtype), (x.shape[0], 1, config.hidden_size))
            x = jnp.concatenate([token, x], axis=1)
        positions = self.param("position_embed", initializer, (config.num_positions, config.hidden_size), jnp.float32)
        x = x + positions[None].astype(x.dtype)
        if config.kind == "clip_vision_model":
            x = LayerNorm(config.layer_norm_eps, name="pre_layernorm")(x)
        several = len(self.feature_layers) > 1
        layers = nn.scan(
            rematerialised(EncoderLayer, self.remat),
            variable_axes=STACKED,
            split_rngs={"params": True},
            length=max(self.feature_layers),
            unroll=SCAN_UNROLL,
        )
        last, states = layers(config, several, name="layers")(x, None)
        if not several:
            return last
        return jnp.concatenate([states[layer - 1] if layer else x for layer in self.feature_layers], axis=-1)
