"""The SigLIP vision encoder up to its last hidden state (Zhai et al., arXiv 2303.15343): no pooling head.

LLaVA-OneVision reads the hidden state before `post_layernorm`, so that weight has no place here.
"""

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from mars_jax.models.configs import VisionConfig
from mars_jax.models.layers import ACTIVATIONS, SCAN_UNROLL, Dense, LayerNorm, attention, rematerialised


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
    """The two-layer feed-forward block."""

    config: VisionConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps x [B, P, D] to [B, P, D]."""
        hidden = ACTIVATIONS[self.config.activation](Dense(self.config.intermediate_size, name="fc1")(x))
        return Dense(self.config.hidden_size, name="fc2")(hidden)


class EncoderLayer(nn.Module):
    """A pre-norm transformer layer, in the carry form of `nn.scan`."""

    config: VisionConfig

    @nn.compact
    def __call__(self, x: Array, _: None) -> tuple[Array, None]:
        """Maps x [B, P, D] to ([B, P, D], None)."""
        eps = self.config.layer_norm_eps
        x = x + SelfAttention(self.config, name="self_attn")(LayerNorm(eps, name="layer_norm1")(x))
        x = x + Mlp(self.config, name="mlp")(LayerNorm(eps, name="layer_norm2")(x))
        return x, None


class SiglipEncoder(nn.Module):
    """Patch embedding, learned positions and `num_layers` encoder layers stacked by `nn.scan`.

    Attributes:
        config: the architecture.
        num_layers: layers to apply (the projector may read an earlier hidden state than the last).
        remat: see `layers.rematerialised`.
    """

    config: VisionConfig
    num_layers: int
    remat: str = "none"

    @nn.compact
    def __call__(self, pixels: Array) -> Array:
        """Maps normalised pixels [B, 3, height, width] to hidden states [B, P, D]."""
        config = self.config
        grid, patch = config.grid_size, config.patch_size
        # A convolution whose stride is its kernel is one matrix product over (channel, row, column) of each patch.
        patches = pixels[:, :, : grid * patch, : grid * patch].reshape(-1, 3, grid, patch, grid, patch)
        patches = patches.transpose(0, 2, 4, 1, 3, 5).reshape(-1, grid * grid, 3 * patch * patch)
        x = Dense(config.hidden_size, name="patch_embed")(patches)
        initializer = nn.initializers.normal(0.02)
        positions = self.param("position_embed", initializer, (config.num_patches, config.hidden_size), jnp.float32)
        x = x + positions[None].astype(x.dtype)
        layers = nn.scan(
            rematerialised(EncoderLayer, self.remat),
            variable_axes={"params": 0, "lora": 0},
            split_rngs={"params": True},
            length=self.num_layers,
            unroll=SCAN_UNROLL,
        )
        x, _ = layers(config, name="layers")(x, None)
        return x
