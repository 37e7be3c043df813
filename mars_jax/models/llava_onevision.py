"""LLaVA-OneVision (arXiv 2408.03326): a SigLIP encoder, a two-layer projector and a Qwen2 decoder.

Tiles, unpadding and newline positions arrive as index arrays made in the input pipeline: the model only gathers.
"""

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from mars_jax.models.configs import LlavaOnevisionConfig
from mars_jax.models.layers import ACTIVATIONS, Dense
from mars_jax.models.multimodal import Batch, Multimodal
from mars_jax.models.qwen2 import Qwen2Decoder
from mars_jax.models.siglip import SiglipEncoder


class Projector(nn.Module):
    """Maps encoder features to the decoder's width."""

    config: LlavaOnevisionConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps x [..., D vision] to [..., D text]."""
        width, bias = self.config.text.hidden_size, self.config.projector_bias
        hidden = ACTIVATIONS[self.config.projector_activation](Dense(width, bias, name="linear_1")(x))
        return Dense(width, bias, name="linear_2")(hidden)


class LlavaOnevision(Multimodal):
    """The whole model; methods and attributes as in `Multimodal`."""

    config: LlavaOnevisionConfig

    def setup(self) -> None:
        """Names the modules as adapters, laws and reports do: vision, projector, llm."""
        config = self.config
        self.vision = SiglipEncoder(config.vision, config.num_vision_layers_used, self.remat)
        self.projector = Projector(config)
        self.llm = Qwen2Decoder(config.text, self.remat)
        self.image_newline = self.param(
            "image_newline", nn.initializers.normal(config.text.hidden_size**-0.5), (config.text.hidden_size,)
        )

    def encode(self, batch: Batch) -> Array:
        """Returns the vision encoder's output [B, N, P, D vision] for pixels [B, N, 3, height, width]."""
        pixels = batch["pixels"]
        size, tiles = pixels.shape[:2]
        encoded = self.vision(pixels.reshape(size * tiles, *pixels.shape[2:]))
        return encoded.reshape(size, tiles, *encoded.shape[1:])

    def image_features(self, encoded: Array) -> Array:
        """Projects [B, N, P, D vision] to rows [B, N * P + 1, D], the last being the newline vector."""
        size, width = encoded.shape[0], self.config.text.hidden_size
        projected = self.projector(encoded).reshape(size, -1, width)
        newline = jnp.broadcast_to(self.image_newline[None, None].astype(projected.dtype), (size, 1, width))
        return jnp.concatenate([projected, newline], axis=1)
