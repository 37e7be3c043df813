"""LLaVA-OneVision (arXiv 2408.03326): a SigLIP encoder, a two-layer projector and a Qwen2 decoder.

Everything that depends on the data (tiles, unpadding, newline positions, where image tokens stand) arrives as index
arrays made in the input pipeline: the model only gathers. What a batch holds is described in `Batch`.
"""

from typing import NotRequired, TypedDict

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from mars_jax.models.configs import LlavaOnevisionConfig
from mars_jax.models.layers import ACTIVATIONS, Dense
from mars_jax.models.qwen2 import Branches, Qwen2Decoder
from mars_jax.models.siglip import SiglipEncoder


class Batch(TypedDict):
    """Inputs of B samples with N tiles each, padded on the right to T tokens; C rows make an image token.

    A row index points into the N * P projected patch features of the sample, N * P being the newline vector; -1 says
    that the token is text. An image token is the weighted sum of its C rows (C > 1 only where any-resolution features
    are scaled down). S supervised positions: hidden state `target_positions` predicts `targets`, weight 0 is padding.
    """

    tokens: Array  # int32 [B, T]
    pixels: NotRequired[Array]  # float32 [B, N, 3, height, width]
    features: NotRequired[Array]  # [B, N, P, D vision], the encoder's output, in place of pixels
    image_index: Array  # int32 [B, T, C]
    image_weight: Array  # float32 [B, T, C]
    targets: Array  # int32 [B, S]
    target_positions: Array  # int32 [B, S]
    target_weights: Array  # float32 [B, S]
    positions: NotRequired[Array]  # int32 [B, T], with `segments`: see `qwen2.Branches`
    segments: NotRequired[Array]  # int32 [B, T]


class Projector(nn.Module):
    """Maps encoder features to the decoder's width."""

    config: LlavaOnevisionConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps x [..., D vision] to [..., D text]."""
        width, bias = self.config.text.hidden_size, self.config.projector_bias
        hidden = ACTIVATIONS[self.config.projector_activation](Dense(width, bias, name="linear_1")(x))
        return Dense(width, bias, name="linear_2")(hidden)


class LlavaOnevision(nn.Module):
    """The whole model. Adapters ride in the `lora` collection: `apply({"params": base, "lora": adapters}, batch)`.

    Attributes:
        config: the architecture.
        remat: what layers keep for the backward pass, see `layers.rematerialised`.
    """

    config: LlavaOnevisionConfig
    remat: str = "none"

    def setup(self) -> None:
        """Names the modules as adapters, laws and reports do: vision, projector, llm."""
        config = self.config
        self.vision = SiglipEncoder(config.vision, config.num_vision_layers_used, self.remat)
        self.projector = Projector(config)
        self.llm = Qwen2Decoder(config.text, self.remat)
        self.image_newline = self.param(
            "image_newline", nn.initializers.normal(config.text.hidden_size**-0.5), (config.text.hidden_size,)
        )

    def __call__(self, batch: Batch) -> Array:
        """Returns float32 logits at the supervised positions [B, S, V]."""
        return self.llm.head(self._supervised(batch))

    def loss(self, batch: Batch) -> tuple[Array, Array]:
        """Returns the summed cross-entropy [] in nats (float32), and the number of supervised tokens [].

        The base gets no gradient through an unadapted head: train adapters with this, not the base.
        """
        hidden = self._supervised(batch)
        rows = hidden.reshape(-1, hidden.shape[-1])
        weights = batch["target_weights"].reshape(-1)
        return self.llm.loss(rows, batch["targets"].reshape(-1), weights), weights.sum()

    def logits(self, batch: Batch) -> Array:
        """Returns float32 logits at every position [B, T, V]."""
        return self.llm.head(self.hidden(batch))

    def encode(self, pixels: Array) -> Array:
        """Returns the vision encoder's output [B, N, P, D vision] for tiles [B, N, 3, height, width]."""
        batch, tiles = pixels.shape[:2]
        encoded = self.vision(pixels.reshape(batch * tiles, *pixels.shape[2:]))
        return encoded.reshape(batch, tiles, *encoded.shape[1:])

    def embed(self, batch: Batch) -> Array:
        """Returns the decoder's input [B, T, D]: embeddings of text and image tokens."""
        text = self.llm.embed(batch["tokens"])
        encoded = batch["features"] if "features" in batch else self.encode(batch["pixels"].astype(text.dtype))
        features = self._image_features(encoded.astype(text.dtype))
        return place_image_features(text, features, batch["image_index"], batch["image_weight"])

    def hidden(self, batch: Batch) -> Array:
        """Returns final hidden states [B, T, D]."""
        return self.llm.hidden(self.embed(batch))

    def _supervised(self, batch: Batch) -> Array:
        """Hidden states at the supervised positions [B, S, D]."""
        branches = Branches(batch["positions"], batch["segments"]) if "segments" in batch else None
        return self.llm.hidden_at(self.embed(batch), batch["target_positions"], branches)

    def _image_features(self, encoded: Array) -> Array:
        """Projects [B, N, P, D vision] to rows [B, N * P + 1, D], the last being the newline vector."""
        batch, width = encoded.shape[0], self.config.text.hidden_size
        projected = self.projector(encoded).reshape(batch, -1, width)
        newline = jnp.broadcast_to(self.image_newline[None, None].astype(projected.dtype), (batch, 1, width))
        return jnp.concatenate([projected, newline], axis=1)


def place_image_features(text: Array, features: Array, index: Array, weight: Array) -> Array:
    """Replaces the embeddings of image tokens by their features.

    Args:
        text: token embeddings [B, T, D].
        features: feature rows [B, N * P + 1, D].
        index: int32 [B, T, C], -1 where the token is text.
        weight: float32 [B, T, C], weights of the C rows.

    Returns:
        [B, T, D].
    """
    batch, length, corners = index.shape
    rows = jnp.take_along_axis(features, jnp.maximum(index, 0).reshape(batch, length * corners, 1), axis=1)
    rows = rows.reshape(batch, length, corners, -1) * weight[..., None].astype(features.dtype)
    return jnp.where(index[:, :, :1] >= 0, rows.sum(axis=2), text)
