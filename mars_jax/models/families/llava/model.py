"""Models of the LLaVA families: a vision transformer, a two-layer projector and a Llama or Qwen2 decoder.

In LLaVA-1.5 (arXiv 2310.03744) a picture is one tile. LLaVA-OneVision (arXiv 2408.03326) cuts it into tiles and ends
rows of features with a learned vector; tiling, unpadding and newline positions are index arrays from the input
pipeline.
"""

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from mars_jax.models.decoder import Qwen2Decoder
from mars_jax.models.families.llava.config import LlavaConfig, LlavaOnevisionConfig
from mars_jax.models.layers import ACTIVATIONS, Dense
from mars_jax.models.multimodal import Batch, Multimodal
from mars_jax.models.vit import VisionTransformer


class Projector(nn.Module):
    """Maps encoder features to the decoder's width."""

    config: LlavaConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps x [..., D vision] to [..., D text]."""
        width, bias = self.config.text.hidden_size, self.config.projector_bias
        hidden = ACTIVATIONS[self.config.projector_activation](Dense(width, bias, name="linear_1")(x))
        return Dense(width, bias, name="linear_2")(hidden)


class Llava(Multimodal):
    """LLaVA-1.5; methods and attributes as in `Multimodal`."""

    config: LlavaConfig

    def setup(self) -> None:
        """Creates the modules vision, projector and llm, named as in adapters, laws and reports."""
        config = self.config
        self.vision = VisionTransformer(config.vision, config.vision_feature_layers, self.remat)
        self.projector = Projector(config)
        self.llm = Qwen2Decoder(config.text, self.remat)

    def encode(self, batch: Batch) -> Array:
        """Returns the vision encoder's output [B, N, P, D vision] for pixels [B, N, 3, height, width]."""
        pixels = batch["pixels"]
        size, tiles = pixels.shape[:2]
        encoded = self.vision(pixels.reshape(size * tiles, *pixels.shape[2:]))
        return encoded.reshape(size, tiles, *encoded.shape[1:])

    def image_features(self, encoded: Array) -> Array:
        """Projects [B, N, P, D vision] to rows [B, N * P, D]."""
        return self.projector(encoded).reshape(encoded.shape[0], -1, self.config.text.hidden_size)


class LlavaOnevision(Llava):
    """LLaVA-OneVision; methods and attributes as in `Multimodal`."""

    config: LlavaOnevisionConfig

    def setup(self) -> None:
        """Creates the same modules, and the newline vector."""
        super().setup()
        width = self.config.text.hidden_size
        self.image_newline = self.param("image_newline", nn.initializers.normal(width**-0.5), (width,))

    def image_features(self, encoded: Array) -> Array:
        """Projects [B, N, P, D vision] to rows [B, N * P + 1, D], the last being the newline vector."""
        projected = super().image_features(encoded)
        size, _, width = projected.shape
        newline = jnp.broadcast_to(self.image_newline[None, None].astype(projected.dtype), (size, 1, width))
        return jnp.concatenate([projected, newline], axis=1)
