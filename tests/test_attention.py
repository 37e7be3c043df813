"""Attention over long sequences, worked off in pieces, against attention at once."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from mars_jax.models import layers

QUICK = {"xla_backend_optimization_level": 0}


def test_pieces_give_what_the_whole_gives(monkeypatch):
    keys = jax.random.split(jax.random.key(0), 3)
    query = jax.random.normal(keys[0], (2, 11, 4, 6))
    key, value = (jax.random.normal(k, (2, 13, 2, 6)) for k in keys[1:])
    visible = jnp.arange(13)[None, None] <= 2 + jnp.arange(11)[None, :, None]

    def both(query, key, value):
        def total(*qkv):
            mixed = layers.attention(*qkv, visible)
            return (mixed**2).sum(), mixed

        return jax.jit(jax.grad(total, (0, 1, 2), has_aux=True), compiler_options=QUICK)(query, key, value)

    whole = both(query, key, value)
    monkeypatch.setattr(layers, "MAX_SCORES", 4 * 13)  # three pieces, the last of three queries and a spare one
    pieces = both(query, key, value)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=1e-5), pieces, whole)
    assert " while(" in jax.jit(layers.attention).lower(query, key, value, visible).compile(QUICK).as_text()


def test_memory_grows_with_the_length_and_not_with_its_square(monkeypatch):
    monkeypatch.setattr(layers, "MAX_SCORES", 2**12)

    def temporary_bytes(length):
        shape = jax.ShapeDtypeStruct((2, length, 4, 8), jnp.float32)
        visible = jnp.arange(length)[None, None] <= jnp.arange(length)[None, :, None]

        def total(*qkv):
            return (layers.attention(*qkv, visible) ** 2).sum()

        compiled = jax.jit(jax.grad(total, (0, 1, 2))).lower(shape, shape, shape).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = temporary_bytes(128), temporary_bytes(1024)
    assert long < 16 * short  # eight times the length; its square would be 64 times
