"""Greedy generation with a key-value cache.

One forward pass prefills the cache with the prompts (see `ExampleSource.prompt`); each further token is a pass of one
token for each row.
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from mars_jax.models.decoder import Cache, take_positions
from mars_jax.runtime.trees import Tree


def generate(
    model: nn.Module,
    base: Tree,
    adapters: Tree,
    batch: Mapping[str, Array],
    *,
    max_new_tokens: int,
    end_tokens: Sequence[int],
    pad_token: int,
) -> Array:
    """Generates greedily after each prompt, until every row has an end token or N tokens.

    To be compiled with `jax.jit`, the base as an argument; one program serves all batches of one shape.

    Args:
        model: a `Multimodal`.
        base: frozen parameters.
        adapters: by collection, such as {"lora": tree}; empty for the base alone.
        batch: B prompts, see `ExampleSource.prompt`.
        max_new_tokens: N, at least 1.
        end_tokens: token ids that end an answer, see `load_end_tokens`.
        pad_token: token id after the end.

    Returns:
        int32 [B, N], end tokens included.
    """
    ends = jnp.asarray(end_tokens, jnp.int32)
    rows, length = batch["tokens"].shape
    positions = batch["positions"].reshape(rows, length, -1).max(axis=-1)
    first_position = take_positions(positions, batch["target_positions"])[:, 0] + 1

    def apply(*arguments: object, method: str) -> tuple[Array, Cache]:
        return model.apply({"params": base, **adapters}, *arguments, method=method)  # type: ignore[return-value]

    def append(logits: Array, number: Array | int, tokens: Array, ended: Array) -> tuple[Array, Array]:
        """Writes the likeliest tokens to column `number` of tokens [B, N]; also returns which rows have ended."""
        chosen = jnp.where(ended, pad_token, jnp.argmax(logits, axis=-1).astype(jnp.int32))
        return tokens.at[:, number].set(chosen), ended | jnp.isin(chosen, ends)

    def unfinished(state: tuple[Array, Array, Array, Cache]) -> Array:
        number, _, ended, _ = state
        return (number < max_new_tokens) & ~ended.all()

    def step(state: tuple[Array, Array, Array, Cache]) -> tuple[Array, Array, Array, Cache]:
        number, tokens, ended, cache = state
        logits, cache = apply(tokens[:, number - 1], first_position + number - 1, cache, method="decode")
        return number + 1, *append(logits, number, tokens, ended), cache

    logits, cache = apply(batch, max_new_tokens, method="prefill")
    padding = jnp.full((rows, max_new_tokens), pad_token, jnp.int32)
    tokens, ended = append(logits, 0, padding, jnp.zeros(rows, bool))
    return jax.lax.while_loop(unfinished, step, (jnp.int32(1), tokens, ended, cache))[1]
