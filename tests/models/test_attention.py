"""Attention over long sequences, worked off in pieces, and by one kernel, against attention at once."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mars_jax.models import attention as attention_module
from mars_jax.models.attention import attention, causal, fused_attention, has_flash, on_each_device
from mars_jax.runtime.sharding import make_mesh

QUICK = {"xla_backend_optimization_level": 0}


def test_pieces_give_what_the_whole_gives(monkeypatch):
    keys = jax.random.split(jax.random.key(0), 3)
    query = jax.random.normal(keys[0], (2, 11, 4, 6))
    key, value = (jax.random.normal(k, (2, 13, 2, 6)) for k in keys[1:])
    visible = jnp.arange(13)[None, None] <= 2 + jnp.arange(11)[None, :, None]

    def both(query, key, value):
        def total(*qkv):
            mixed = attention(*qkv, visible)
            return (mixed**2).sum(), mixed

        return jax.jit(jax.grad(total, (0, 1, 2), has_aux=True), compiler_options=QUICK)(query, key, value)

    whole = both(query, key, value)
    monkeypatch.setattr(
        attention_module, "MAX_SCORES", 4 * 13
    )  # three pieces, the last of three queries and a spare one
    pieces = both(query, key, value)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=1e-5), pieces, whole)
    assert " while(" in jax.jit(attention).lower(query, key, value, visible).compile(QUICK).as_text()


def test_memory_grows_with_the_length_and_not_with_its_square(monkeypatch):
    monkeypatch.setattr(attention_module, "MAX_SCORES", 2**12)

    def temporary_bytes(length):
        shape = jax.ShapeDtypeStruct((2, length, 4, 8), jnp.float32)
        visible = jnp.arange(length)[None, None] <= jnp.arange(length)[None, :, None]

        def total(*qkv):
            return (attention(*qkv, visible) ** 2).sum()

        compiled = jax.jit(jax.grad(total, (0, 1, 2))).lower(shape, shape, shape).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = temporary_bytes(128), temporary_bytes(1024)
    assert long < 16 * short  # eight times the length; its square would be 64 times


@pytest.mark.parametrize("length", [10, 11])
def test_lanes_of_a_kernel_are_its_batch_whatever_they_share(length):
    """Masks are shared by lanes, and so are queries, keys or values that no adapter changed yet."""
    keys = jax.random.split(jax.random.key(0), 3)
    query = jax.random.normal(keys[0], (3, 2, length, 4, 8))
    key, value = (jax.random.normal(k, (2, 12 + length % 2, 2, 8)) for k in keys[1:])
    visible = jnp.arange(key.shape[1])[None, None] <= 2 + jnp.arange(length)[None, :, None]
    seen = jnp.concatenate([visible, visible[:, ::-1]])
    kernel = partial(fused_attention, implementation="xla")

    def plain(*arrays):
        return attention(*arrays).reshape(2, length, 4, 8)

    def both(attend, mask):
        def total(*qkv):
            mixed = attend(*qkv, mask)
            return (mixed**2).sum(), mixed

        return jax.vmap(jax.grad(total, (0, 1, 2), has_aux=True), (0, None, None))(query, key, value)

    for mask in (None, visible, seen):
        jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=1e-5), both(kernel, mask), both(plain, mask))


def test_a_kernel_that_is_causal_sees_what_the_mask_shows():
    query, key, value = jax.random.normal(jax.random.key(1), (3, 2, 9, 4, 8))
    kernel = partial(fused_attention, implementation="xla", is_causal=True)
    masked = attention(query, key, value, causal(9))
    np.testing.assert_allclose(kernel(query, key, value).reshape(2, 9, 32), masked, rtol=0, atol=1e-5)
    np.testing.assert_allclose(attention(query, key, value, is_causal=True), masked, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("axis", "own"), [("lane", (2, 6, 4, 8)), ("data", (1, 6, 4, 8)), ("fsdp", (1, 6, 4, 8)), ("tensor", (2, 6, 2, 8))]
)
def test_every_device_attends_for_its_own_samples_and_heads(axis, own):
    """XLA can't split a kernel: on two GPUs the program didn't compile."""
    mesh = make_mesh({axis: 2}, jax.devices()[:2])
    query, key, value = jax.random.normal(jax.random.key(2), (3, 4, 2, 6, 4, 8))  # lanes, samples, ...
    kernel = partial(fused_attention, implementation="xla", is_causal=True)
    seen = []

    def shape_seen(x):
        seen.append(x.shape)
        return x

    def total(*qkv):
        on_each_device(shape_seen)(qkv[0][0])
        return jax.vmap(jax.grad(lambda *of_lane: (kernel(*of_lane) ** 2).sum(), (0, 1, 2)))(*qkv)

    lanes = PartitionSpec("lane")
    mapped = jax.shard_map(total, mesh=mesh, in_specs=lanes, out_specs=lanes, axis_names={"lane"}, check_vma=False)
    placed = jax.device_put((query, key, value), NamedSharding(mesh, PartitionSpec("lane", "data", None, "tensor")))
    program = jax.jit(mapped).lower(*placed).compile()
    assert seen[-1] == own
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=0, atol=1e-5), program(*placed), jax.jit(total)(query, key, value)
    )
    assert not re.findall(r"all-(?:gather|reduce|to-all)|collective-permute", program.as_text())


def test_flash_attention_is_told_by_the_name_of_a_dtype_too(monkeypatch):
    """The plan of memory named the dtype as the config does, and counted scores that no GPU keeps."""
    monkeypatch.setattr(attention_module, "_cuda_capability", lambda: 9.0)
    assert all(has_flash(dtype, 64) for dtype in ("bfloat16", jnp.bfloat16, jnp.zeros((), jnp.bfloat16).dtype))
    assert not any(has_flash(*unfit) for unfit in (("float32", 64), ("bfloat16", 60), ("bfloat16", 256)))
    monkeypatch.setattr(attention_module, "_cuda_capability", lambda: 7.5)
    assert not has_flash("bfloat16", 64)
