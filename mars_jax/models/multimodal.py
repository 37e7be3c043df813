"""What every family does alike: image features take the places of image tokens, and the decoder reads the result.

A family says how pictures become feature rows (`encode`, `image_features`) and names its modules; see `families`.
Everything that depends on the data (where image tokens stand and which rows they are) arrives as index arrays.
"""

from typing import NotRequired, TypedDict

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from mars_jax.models.configs import ModelConfig
from mars_jax.models.decoder import Cache, Layout, take_positions


class Batch(TypedDict):
    """Inputs of B samples with N tiles each, padded on the right to T tokens; C rows make an image token.

    A row index points into the feature rows of the sample (see `image_features` of the family); -1 says that the
    token is text. An image token is the weighted sum of its C rows (C > 1 only where any-resolution features are
    scaled down). S supervised positions: hidden state `target_positions` predicts `targets`, weight 0 is padding.
    """

    tokens: Array  # int32 [B, T]
    pixels: NotRequired[Array]  # float32 [B, N, ...], tiles as the family's encoder takes them
    features: NotRequired[Array]  # [B, N, P, D vision], the encoder's output, in place of pixels
    patch_positions: NotRequired[Array]  # int32 [B, N, P, 2], row and column of a patch in its picture: Qwen2.5-VL
    patch_images: NotRequired[Array]  # int32 [B, N, P], number of a patch's picture, -1 padding: Qwen2.5-VL
    image_index: Array  # int32 [B, T, C]
    image_weight: Array  # float32 [B, T, C]
    targets: Array  # int32 [B, S]
    target_positions: Array  # int32 [B, S]
    target_weights: Array  # float32 [B, S]
    positions: NotRequired[Array]  # int32 [B, T] or [B, T, 3]: see `qwen2.Layout`
    segments: NotRequired[Array]  # int32 [B, T]: see `qwen2.Layout`


class Multimodal(nn.Module):
    """A family's model. Adapters ride in the `lora` collection: `apply({"params": base, "lora": adapters}, batch)`.

    Attributes:
        config: the architecture.
        remat: what layers keep for the backward pass, see `layers.rematerialised`.
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
        """Reads prompts, to go on from the position of the one target that each has.

        Args:
            batch: prompts with positions and segments, S = 1: see `ExampleSource.prompt`.
            room: places to keep for tokens that follow.

        Returns:
            Float32 logits of the first token that follows [B, V], and the cache, with C = T + `room`.
        """
        embeddings = self.embed(batch)
        segments = jnp.pad(batch["segments"], [(0, 0), (0, room)], constant_values=1)
        cache = self.llm.empty_cache(segments, embeddings.dtype)
        hidden, cache = self.llm.extend(embeddings, batch["positions"], cache)
        return self.llm.head(take_positions(hidden, batch["target_positions"])[:, 0]), cache

    def decode(self, tokens: Array, positions: Array, cache: Cache) -> tuple[Array, Cache]:
        """Reads one more token of each row.

        Args:
            tokens: int32 [B].
            positions: int32 [B], rotary positions; text goes on along all axes alike.
            cache: of `prefill`, or of the token before.

        Returns:
            Float32 logits of the token after it [B, V], and the cache with this one.
        """
        hidden, cache = self.llm.extend(self.llm.embed(tokens[:, None]), positions[:, None], cache)
        return self.llm.head(hidden[:, 0]), cache

    def _supervised(self, batch: Batch) -> Array:
        """Hidden states at the supervised positions [B, S, D]."""
        return self.llm.hidden_at(self.embed(batch), batch["target_positions"], _layout(batch))


def _layout(batch: Batch) -> Layout | None:
    return Layout(batch["positions"], batch.get("segments")) if "positions" in batch else None


def place_image_features(text: Array, features: Array, index: Array, weight: Array) -> Array:
    """Replaces the embeddings of image tokens by their features.

    Args:
        text: token embeddings [B, T, D].
        features: feature rows [B, rows, D].
        index: int32 [B, T, C], -1 where the token is text.
        weight: float32 [B, T, C], weights of the C rows.

    Returns:
        [B, T, D].
    """
    batch, length, corners = index.shape
    rows = jnp.take_along_axis(features, jnp.maximum(index, 0).reshape(batch, length * corners, 1), axis=1)
    rows = rows.reshape(batch, length, corners, -1) * weight[..., None].astype(features.dtype)
    return jnp.where(index[:, :, :1] >= 0, rows.sum(axis=2), text)
