"""Greedy generation: the tokens that a model says after its prompts. Prompts are made in `data`, scored in `evaluate`.

One pass reads the prompts and keeps their keys and values; each further token is a pass of one token a row.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from mars_jax.errors import ConfigError
from mars_jax.hub.read import read_json
from mars_jax.models.decoder import Cache, take_positions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GENERATION_FILE = "generation_config.json"


def load_end_tokens(directory: Path, tokenizer: "PreTrainedTokenizerBase") -> tuple[int, ...]:
    """The tokens that end an answer: those of generation_config.json, where the folder has it, and the tokenizer's.

    The tokenizer's is among them whatever the file says: training ends answers with it.

    Raises:
        ConfigError: a file that can't be read or names no tokens, or no token at all.
    """
    path = directory / GENERATION_FILE
    found = read_json(path).get("eos_token_id") if path.is_file() else None
    named = found if isinstance(found, list) else [found] * (found is not None)
    if not all(isinstance(token, int) for token in named):
        raise ConfigError(
            f"{path}: eos_token_id is {found!r}; the id of a token or a list of such is expected. Copy the file from "
            "the checkpoint's source."
        )
    tokens = {*named, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])}
    if not tokens:
        raise ConfigError(
            f"{directory}: neither {GENERATION_FILE} nor the tokenizer says which token ends an answer. Set eos_token "
            "in tokenizer_config.json."
        )
    return tuple(sorted(tokens))


def generate(
    model: nn.Module,
    base: Mapping[str, Any],
    adapters: Mapping[str, Any],
    batch: Mapping[str, Any],
    *,
    max_new_tokens: int,
    end_tokens: Sequence[int],
    pad_token: int,
) -> Array:
    """The likeliest token after each prompt, and so on, until every row has said an end token.

    For `jax.jit`, with the base as an argument; a program serves all batches of one shape.

    Args:
        model: a `Multimodal`.
        base: frozen parameters.
        adapters: of the `lora` collection; empty for the base alone.
        batch: B prompts, see `ExampleSource.prompt`.
        max_new_tokens: N, at least 1.
        end_tokens: those that end an answer, see `load_end_tokens`.
        pad_token: what follows the end.

    Returns:
        int32 [B, N], end tokens included.
    """
    apply: Callable[..., Any] = partial(model.apply, {"params": base, "lora": adapters})
    ends = jnp.asarray(end_tokens, jnp.int32)
    rows, length = batch["tokens"].shape
    places = batch["positions"].reshape(rows, length, -1).max(axis=-1)
    first_place = take_positions(places, batch["target_positions"])[:, 0] + 1

    def say(logits: Array, number: Array | int, tokens: Array, ended: Array) -> tuple[Array, Array]:
        """Tokens [B, N] with the one of this number, and which rows have ended with it or before."""
        chosen = jnp.where(ended, pad_token, jnp.argmax(logits, axis=-1).astype(jnp.int32))
        return tokens.at[:, number].set(chosen), ended | jnp.isin(chosen, ends)

    def unfinished(state: tuple[Array, Array, Array, Cache]) -> Array:
        number, _, ended, _ = state
        return (number < max_new_tokens) & ~ended.all()

    def step(state: tuple[Array, Array, Array, Cache]) -> tuple[Array, Array, Array, Cache]:
        number, tokens, ended, cache = state
        logits, cache = apply(tokens[:, number - 1], first_place + number - 1, cache, method="decode")
        return number + 1, *say(logits, number, tokens, ended), cache

    logits, cache = apply(batch, max_new_tokens, method="prefill")
    nothing = jnp.full((rows, max_new_tokens), pad_token, jnp.int32)
    tokens, ended = say(logits, 0, nothing, jnp.zeros(rows, bool))
    return jax.lax.while_loop(unfinished, step, (jnp.int32(1), tokens, ended, cache))[1]
