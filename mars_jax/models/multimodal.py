"""Base class of multimodal models: image features replace the embeddings of image tokens in the decoder's input.

A family implements `encode` and `image_features` and names its modules; see `families`. Everything that depends on the
data (positions of image tokens and their feature rows) is given as index arrays.
"""

from typing import NotRequired, TypedDict

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from mars_jax.models.configs import ModelConfig
from mars_jax.models.decoder import Cache, Layout, take_positions


class Batch(TypedDict):
    """Inputs of B samples with N tiles each, padded on the right to T tokens.

    `image_index` holds indices of the sample's feature rows (see `image_features` of the family), or -1 for text. An
    image token is the weighted sum of C rows (C > 1 only if any-resolution features are scaled down). S supervised
    positions: the hidden state at `target_positions` predicts `targets`; weight 0 is padding. A family's encoder may
    have inputs besides `pixels`, see its `encoder_inputs`.
    """

    tokens: Array  # int32 [B, T]
    pixels: NotRequired[Array]  # float32 [B, N, ...], tiles in the form of the family's encoder
    features: NotRequired[Array]  # [B, N, P, D vision], the encoder's output, given instead of pixels
    image_index: Array  # int32 [B, T, C]
    image_weight: Array  # float32 [B, T, C]
    targets: Array  # int32 [B, S]
    target_positions: Array  # int32 [B, S]
    target_weights: Array  # float32 [B, S]
    positions: NotRequired[Array]  # int32 [B, T] or [B, T, 3]: see `decoder.Layout`
    segments: NotRequired[Array]  # int32 [B, T]: see `decoder.Layout`


class Multimodal(nn.Module):
    """Base class of a family's model.

    Adapters are a separate collection, named after their method: `apply({"params": base, "lora": adapters}, batch)`.

    Attributes:
        config: the architecture.
        remat: rematerialisation policy of the layers, see `layers.rematerialised`.
    """

    config: ModelConfig
    remat: str = "none"

    def encode(self, batch: Batch) -> Array:
        """Returns the vision encoder's output [B, N, P, D vision]."""
        raise NotImplementedError

    def image_features(self, encoded: Array) -> Array:
        """Returns the rows that image tokens point to, [B, rows, D], from the encoder's output [B, N, P, D vision]."""
        raise NotImplementedError

    def __call__(self, batch: Batch) -> Array:
        """Returns float32 logits at the supervised positions [B, S, V]."""
        return self.llm.head(self._supervised(batch))

    def loss(self, batch: Batch) -> tuple[Array, Array]:
        """Returns the summed cross-entropy of each row [B] in nats (float32), and its supervised tokens [B].

        An unadapted head has no gradient, so this loss trains adapters and not the base.
        """
        hidden = self._supervised(batch)
        rows = hidden.reshape(-1, hidden.shape[-1])
        weights = batch["target_weights"]
        losses = self.llm.losses(rows, batch["targets"].reshape(-1), weights.reshape(-1))
        return losses.reshape(weights.shape).sum(axis=1), weights.sum(axis=1)

    def logits(self, batch: Batch) -> Array:
        """Returns float32 logits at every position [B, T, V]."""
        return self.llm.head(self.hidden(batch))

    def embed(self, batch: Batch) -> Array:
        """Returns the decoder's input [B, T, D]: embeddings of text and image tokens."""
        text = self.llm.embed(batch["tokens"])
        if "features" in batch:
            encoded = batch["features"]
        else:
            encoded = self.encode({**batch, "pixels": batch["pixels"].astype(text.dtype)})
        features = self.image_features(encoded.astype(text.dtype))
        return place_image_features(text, features, batch["image_index"], batch["image_weight"])

    def hidden(self, batch: Batch) -> Array:
        """Returns final hidden states [B, T, D]."""
        return self.llm.hidden(self.embed(batch), _layout(batch))

    def prefill(self, batch: Batch, room: int) -> tuple[Array, Cache]:
        """Fills a cache with prompts; generation continues at the one target position of each.

        Args:
            batch: prompts with positions and segments, S = 1: see `ExampleSource.prompt`.
            room: number of cache entries reserved for generated tokens.

        Returns:
            Float32 logits of the next token [B, V], and the cache, of T + `room` entries.
        """
        embeddings = self.embed(batch)
        segments = jnp.pad(batch["segments"], [(0, 0), (0, room)], constant_values=1)
        cache = self.llm.empty_cache(segments, embeddings.dtype)
        hidden, cache = self.llm.extend(embeddings, batch["positions"], cache)
        return self.llm.head(take_positions(hidden, batch["target_positions"])[:, 0]), cache

    def decode(self, tokens: Array, positions: Array, cache: Cache) -> tuple[Array, Cache]:
        """Extends the cache by one token of each row.

        Args:
            tokens: int32 [B].
            positions: int32 [B], rotary positions, the same along all axes since the tokens are text.
            cache: from `prefill`, or from the previous token.

        Returns:
            Float32 logits of the next token [B, V], and the extended cache.
        """
        hidden, cache = self.llm.extend(self.llm.embed(tokens[:, None]), positions[:, None], cache)
        return self.llm.head(hidden[:, 0]), cache

    def _supervised(self, batch: Batch) -> Array:
        """Hidden states at the supervised positions [B, S, D]."""
        return self.llm.hidden_at(self.embed(batch), batch["target_positions"], _layout(batch))


def _layout(batch: Batch) -> Layout | None:
    return Layout(batch["positions"], batch.get("segments")) if "positions" in batch else None


def place_image_features(text: Array, features: Array, index: Array, weight: Array) -> Array:
    """Replaces the embeddings of image tokens with their features.

    Args:
        text: token embeddings [B, T, D].
        features: feature rows [B, rows, D].
        index: indices of feature rows, int32 [B, T, C], -1 for text.
        weight: float32 [B, T, C], weights of the C rows.

    Returns:
        [B, T, D].
    """
    batch, length, corners = index.shape
    rows = jnp.take_along_axis(features, jnp.maximum(index, 0).reshape(batch, length * corners, 1), axis=1)
    rows = rows.reshape(batch, length, corners, -1) * weight[..., None].astype(features.dtype)
    return jnp.where(index[:, :, :1] >= 0, rows.sum(axis=2), text)
