"""Softmax attention with grouped queries, with a choice of kernel.

On NVIDIA GPUs in bfloat16 the kernel is cuDNN's flash attention (Dao et al., arXiv 2205.14135), which keeps no scores;
elsewhere it is plain matrix products. Callers handle rotary positions, segments and caches.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Literal, TypeVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.custom_batching import custom_vmap
from jax.sharding import AbstractMesh, PartitionSpec
from jax.typing import DTypeLike

from mars_jax.runtime.sharding import BATCH_AXES, HEAD_AXIS

# Largest number of scores of one head and sample in memory at once: those of 1024 queries and 1024 keys.
MAX_SCORES = 2**20

# cuDNN's kernels support head sizes that are multiples of 8 up to 128, on Ampere and later GPUs.
_HEAD_MULTIPLE, _LARGEST_HEAD, _LEAST_CAPABILITY = 8, 128, 8.0
# With fewer queries, as in generation, there are few scores; the kernels were not tested with fewer.
_LEAST_QUERIES = 32

OutT = TypeVar("OutT", bound=Array | tuple[Array, ...])


def attention(
    query: Array, key: Array, value: Array, visible: Array | None = None, *, is_causal: bool = False
) -> Array:
    """Softmax attention with grouped queries; the softmax is in float32.

    Args:
        query: [B, S, H, head].
        key: [B, T, G, head], with H a multiple of G.
        value: [B, T, G, head].
        visible: bool [B or 1, S, T], whether a query attends to a key; None: to all, subject to `is_causal`.
        is_causal: whether queries attend only to their own and earlier positions, S = T; used instead of `visible`.

    Returns:
        [B, S, H * head].
    """
    # XLA cannot partition cuDNN's kernels, so with several devices the mesh must be known: see `on_each_device`.
    known = jax.device_count() == 1 or not jax.sharding.get_abstract_mesh().empty
    if known and has_flash(query.dtype, query.shape[-1]) and query.shape[1] >= _LEAST_QUERIES:
        mixed = fused_attention(query, key, value, visible, is_causal=is_causal)
    else:
        mixed = _plain_attention(query, key, value, causal(query.shape[1]) if is_causal else visible)
    return checkpoint_name(mixed.reshape(*query.shape[:2], -1), "attention")


def causal(length: int) -> Array:
    """The causal mask, bool [1, T, T]."""
    return jnp.tril(jnp.ones((1, length, length), bool))


def has_flash(dtype: DTypeLike, head_dim: int) -> bool:
    """Whether the devices and cuDNN support flash attention for heads of this dtype and size."""
    fits = jnp.dtype(dtype) == jnp.bfloat16 and head_dim % _HEAD_MULTIPLE == 0 and head_dim <= _LARGEST_HEAD
    return fits and _cuda_capability() >= _LEAST_CAPABILITY


@cache
def _cuda_capability() -> float:
    """Compute capability of the devices in use, such as 9.0; 0 if they are not NVIDIA's."""
    device = jax.devices()[0]
    if device.platform != "gpu":
        return 0.0
    try:
        return float(device.compute_capability)
    except ValueError:  # AMD GPUs give a name, not a number
        return 0.0


def fused_attention(
    query: Array,
    key: Array,
    value: Array,
    visible: Array | None = None,
    *,
    is_causal: bool = False,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Array:
    """Attention by one kernel of `jax.nn.dot_product_attention`.

    The batching rule of the kernel fails if lanes share a mask, or one of query, key and value, so under `jax.vmap`
    lanes are folded into the batch axis here. For this, the backward pass runs the forward kernel again. JAX does not
    support odd lengths in training, so they are padded; no other query attends to the padding.

    Args:
        query: [B, S, H, head].
        key: [B, T, G, head], with H a multiple of G.
        value: [B, T, G, head].
        visible: as in `attention`.
        is_causal: as in `attention`.
        implementation: the kernel, as in `jax.nn.dot_product_attention`.

    Returns:
        [B, S, H, head].
    """

    def kernel(query: Array, key: Array, value: Array, *mask: Array) -> Array:
        length, keys = query.shape[1], key.shape[1]
        seen = lengths = None
        if mask:
            # Padded queries get the mask of the last one, so that their softmax is over at least one key.
            seen = jnp.pad(mask[0], [(0, 0), (0, length % 2), (0, 0)], mode="edge")
            seen = jnp.pad(seen, [(0, 0), (0, 0), (0, keys % 2)])[:, None]
        elif keys % 2 and not is_causal:
            lengths = jnp.full(len(key), keys, jnp.int32)
        mixed = jax.nn.dot_product_attention(
            _of_even_length(query),
            _of_even_length(key),
            _of_even_length(value),
            mask=seen,
            is_causal=is_causal,
            key_value_seq_lengths=lengths,
            implementation=implementation,
        )
        return mixed[:, :length]

    def pull_back(cotangent: Array, query: Array, key: Array, value: Array, *mask: Array) -> tuple[Array, ...]:
        return jax.vjp(lambda *qkv: kernel(*qkv, *mask), query, key, value)[1](cotangent)

    @jax.custom_vjp
    def mixed(*arrays: Array) -> Array:
        return on_each_device(lanes_in_batch(kernel))(*arrays)

    def forward(*arrays: Array) -> tuple[Array, tuple[Array, ...]]:
        return mixed(*arrays), arrays

    def backward(arrays: tuple[Array, ...], cotangent: Array) -> tuple[Array | None, ...]:
        return *on_each_device(lanes_in_batch(pull_back))(cotangent, *arrays), *[None] * (len(arrays) - 3)

    mixed.defvjp(forward, backward)
    if visible is None:
        return mixed(query, key, value)
    return mixed(query, key, value, jnp.broadcast_to(visible, (len(query), *visible.shape[1:])))


def on_each_device(kernel: Callable[..., OutT]) -> Callable[..., OutT]:
    """Partitions a function of arrays [B, S, H, head] and [B, ...] over devices by samples and heads.

    The mesh is that of an enclosing `jax.shard_map` over some of its axes, as in `lanes.engine`; the other axes become
    manual here. Heads are not split if H or G is not a multiple of the number of devices along `tensor`.
    """

    def partitioned(*arrays: Array) -> OutT:
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.size <= 1:
            return kernel(*arrays)
        samples = _dividing(mesh, BATCH_AXES, [len(array) for array in arrays])
        heads = _dividing(mesh, (HEAD_AXIS,), [array.shape[2] for array in arrays if array.ndim == 4])

        def spec(array: Array | jax.ShapeDtypeStruct) -> PartitionSpec:
            return PartitionSpec(samples, None, heads) if array.ndim == 4 else PartitionSpec(samples)

        # All axes must be named, including those that are manual already; otherwise JAX partitions the kernel itself.
        return jax.shard_map(
            kernel,
            in_specs=tuple(map(spec, arrays)),
            out_specs=jax.tree.map(spec, jax.eval_shape(kernel, *arrays)),
            axis_names=set(mesh.axis_names),
            check_vma=False,
        )(*arrays)

    return partitioned


def _dividing(mesh: AbstractMesh, axes: tuple[str, ...], sizes: Sequence[int]) -> tuple[str, ...] | None:
    """The axes that the mesh has, if their number of devices divides all sizes; else None, for no partition."""
    present = tuple(axis for axis in axes if axis in mesh.axis_names)
    parts = math.prod(mesh.shape[axis] for axis in present)
    return present if all(size % parts == 0 for size in sizes) else None


def lanes_in_batch(kernel: Callable[..., OutT]) -> Callable[..., OutT]:
    """Gives a function of arrays [B, ...] a batching rule: `vmap` over K lanes is one call with arrays [K * B, ...]."""
    mapped = custom_vmap(kernel)

    @mapped.def_vmap
    def once(lanes: int, is_mapped: list[bool], *arrays: Array) -> tuple[OutT, OutT]:
        def fold(array: Array, has_lanes: bool) -> Array:
            whole = array if has_lanes else jnp.broadcast_to(array[None], (lanes, *array.shape))
            return whole.reshape(-1, *whole.shape[2:])

        outputs = mapped(*map(fold, arrays, is_mapped))
        unfolded = jax.tree.map(lambda x: x.reshape(lanes, -1, *x.shape[1:]), outputs)
        return unfolded, jax.tree.map(lambda _: True, outputs)

    return mapped


def _of_even_length(x: Array) -> Array:
    """Pads an array [B, S, ...] with one row of zeros if S is odd."""
    return jnp.pad(x, [(0, x.shape[1] % 2 if axis == 1 else 0) for axis in range(x.ndim)])


def _plain_attention(query: Array, key: Array, value: Array, visible: Array | None) -> Array:
    """Attention by matrix products, [B, S, H, head].

    Long sequences are processed in chunks of queries, recomputed in the backward pass, so that memory for scores grows
    linearly with the length; `visible` takes a byte for each query and key.
    """
    batch, length, heads, head_dim = query.shape
    keys, groups = key.shape[1:3]
    query = query.reshape(batch, length, groups, heads // groups, head_dim)
    if length * keys <= MAX_SCORES:
        return _attend(query, key, value, visible)
    rows = max(1, MAX_SCORES // keys)
    chunks = -(-length // rows)
    spare = chunks * rows - length
    seen = jnp.ones((1, length, keys), bool) if visible is None else visible

    def in_chunks(x: Array) -> Array:
        padded = jnp.pad(x, [(0, spare) if axis == 1 else (0, 0) for axis in range(x.ndim)])
        return padded.reshape(x.shape[0], chunks, rows, *x.shape[2:]).swapaxes(0, 1)

    attend_chunk = jax.checkpoint(lambda pair: _attend(pair[0], key, value, pair[1]))
    mixed = jax.lax.map(attend_chunk, (in_chunks(query), in_chunks(seen)))
    return mixed.swapaxes(0, 1).reshape(batch, chunks * rows, groups, -1, head_dim)[:, :length]


def _attend(query: Array, key: Array, value: Array, visible: Array | None) -> Array:
    """Attention of queries [B, S, G, H / G, head]; the output has the same shape."""
    scores = jnp.einsum("btghd,bsgd->bghts", query, key).astype(jnp.float32) * query.shape[-1] ** -0.5
    if visible is not None:
        # Added, because a `where` on the scores would keep a mask of their size for the backward pass.
        scores += jnp.where(visible, 0.0, jnp.finfo(jnp.float32).min / 2)[:, None, None]
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("bghts,bsgd->btghd", weights, value)
