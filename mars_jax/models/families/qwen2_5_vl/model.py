"""Qwen2.5-VL (arXiv 2502.13923): an encoder with window attention, a patch merger, and a Qwen2 decoder with M-RoPE.

Pictures of any size are given as windows, each padded to one size: layers with window attention are a batch of small
attentions, and only the few layers with full attention process a picture as a whole. The input pipeline assigns patches
to windows and merged rows to image tokens.
"""

from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from mars_jax.models.attention import attention
from mars_jax.models.decoder import Qwen2Decoder
from mars_jax.models.families.qwen2_5_vl.config import Qwen25VlConfig, QwenVisionConfig
from mars_jax.models.layers import ACTIVATIONS, SCAN_UNROLL, STACKED, Dense, RMSNorm, rematerialised, rotate
from mars_jax.models.multimodal import Batch, Multimodal

_NORM_EPS = 1e-6


class WindowBatch(Batch):
    """A batch with the encoder inputs besides `pixels`."""

    patch_positions: Array  # int32 [B, N, P, 2], row and column of a patch in its picture
    patch_images: Array  # int32 [B, N, P], index of a patch's picture, -1 for padding


class SelfAttention(nn.Module):
    """Multi-head attention within windows or pictures, with a fused linear for queries, keys and values."""

    config: QwenVisionConfig

    @nn.compact
    def __call__(self, x: Array, angles: Array, images: Array, full: Array) -> Array:
        """Maps x [B, N, P, D] to the same shape; `full` bool []: over whole pictures, else within windows."""
        size, windows, patches, width = x.shape
        fused = Dense(3 * width, name="qkv")(x).reshape(size * windows, patches, 3, self.config.num_heads, -1)
        query, key, value = (fused[:, :, i] for i in range(3))
        angles = angles.reshape(size * windows, patches, -1)
        query, key = rotate(query, angles), rotate(key, angles)

        def attend(sequences: int) -> Callable[..., Array]:
            def mixed(*qkv: Array) -> Array:
                query, key, value = (y.reshape(sequences, -1, *y.shape[2:]) for y in qkv)
                of_patch = images.reshape(sequences, -1)
                visible = (of_patch[:, :, None] == of_patch[:, None, :]) & (of_patch >= 0)[:, None, :]
                # Padding attends to itself, so that its softmax is over at least one key.
                visible |= jnp.eye(of_patch.shape[1], dtype=bool)[None]
                return attention(query, key, value, visible).reshape(x.shape)

            return jax.checkpoint(mixed)  # otherwise every layer of the scan keeps the scores of both branches

        mixed = jax.lax.cond(full, attend(size), attend(size * windows), query, key, value)
        mixed = checkpoint_name(mixed, "attention")
        return Dense(width, name="proj")(mixed)


class Mlp(nn.Module):
    """Gated feed-forward block, with biases."""

    config: QwenVisionConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps x [..., D] to [..., D]."""
        gate = ACTIVATIONS[self.config.activation](Dense(self.config.intermediate_size, name="gate_proj")(x))
        up = Dense(self.config.intermediate_size, name="up_proj")(x)
        return Dense(self.config.hidden_size, name="down_proj")(gate * up)


class EncoderLayer(nn.Module):
    """Pre-norm transformer layer, in the carry form of `nn.scan`."""

    config: QwenVisionConfig

    @nn.compact
    def __call__(self, x: Array, full: Array, angles: Array, images: Array) -> tuple[Array, None]:
        """Maps x [B, N, P, D] to the same shape; see `SelfAttention`."""
        x = x + SelfAttention(self.config, name="self_attn")(RMSNorm(_NORM_EPS, name="norm1")(x), angles, images, full)
        x = x + Mlp(self.config, name="mlp")(RMSNorm(_NORM_EPS, name="norm2")(x))
        return x, None


class WindowEncoder(nn.Module):
    """Patch embedding and encoder layers stacked by `nn.scan`.

    Attributes:
        config: the architecture.
        remat: see `layers.rematerialised`.
    """

    config: QwenVisionConfig
    remat: str = "none"

    @nn.compact
    def __call__(self, pixels: Array, positions: Array, images: Array) -> Array:
        """Maps patches [B, N, P, values], positions [B, N, P, 2] and pictures [B, N, P] to states [B, N, P, D]."""
        config = self.config
        x = Dense(config.hidden_size, use_bias=False, name="patch_embed")(pixels)
        frequencies = jnp.arange(0, config.head_dim // 2, 2, dtype=jnp.float32) / (config.head_dim // 2)
        # The first half of the angles is for the row, the second for the column.
        angles = positions.astype(jnp.float32)[..., None] * (config.rope_theta**-frequencies)[None, None, None, None]
        angles = angles.reshape(*positions.shape[:3], -1)
        full = jnp.asarray(np.isin(np.arange(config.num_layers), config.full_attention_layers))
        layers = nn.scan(
            rematerialised(EncoderLayer, self.remat),
            variable_axes=STACKED,
            in_axes=(0, nn.broadcast, nn.broadcast),
            split_rngs={"params": True},
            length=config.num_layers,
            unroll=SCAN_UNROLL,
        )
        x, _ = layers(config, name="layers")(x, full, angles, images)
        return x


class PatchMerger(nn.Module):
    """Concatenates the patches of a group and maps them to the decoder's width."""

    config: Qwen25VlConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps x [B, N, P, D vision], group by group, to [B, N * P / group, D]."""
        width = self.config.vision.hidden_size * self.config.vision.group
        normal = RMSNorm(_NORM_EPS, name="norm")(x).reshape(x.shape[0], -1, width)
        hidden = ACTIVATIONS["gelu"](Dense(width, name="linear_1")(normal))
        return Dense(self.config.text.hidden_size, name="linear_2")(hidden)


class Qwen25Vl(Multimodal):
    """Qwen2.5-VL; methods and attributes as in `Multimodal`. Text without pictures needs no `positions`."""

    config: Qwen25VlConfig

    def setup(self) -> None:
        """Creates the modules vision, projector and llm, named as in adapters, laws and reports."""
        self.vision = WindowEncoder(self.config.vision, self.remat)
        self.projector = PatchMerger(self.config)
        self.llm = Qwen2Decoder(self.config.text, self.remat)

    def encode(self, batch: Batch) -> Array:
        """Returns the encoder's states [B, N, P, D vision] for pixels [B, N, P, values] of N windows."""
        windows = cast(WindowBatch, batch)
        return self.vision(windows["pixels"], windows["patch_positions"], windows["patch_images"])

    def image_features(self, encoded: Array) -> Array:
        """Merges [B, N, P, D vision] to rows [B, N * P / group, D], in the order of groups in the windows."""
        return self.projector(encoded)
