"""Softmax attention with grouped queries, for every architecture, and which kernel computes it.

On an NVIDIA GPU in bfloat16 that is cuDNN's flash attention (Dao et al., arXiv 2205.14135), which keeps no scores;
elsewhere plain products. Rotary positions, segments and caches are the callers' business.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.custom_batching import custom_vmap
from jax.sharding import AbstractMesh, PartitionSpec
from jax.typing import DTypeLike

from mars_jax.runtime.sharding import BATCH_AXES, HEAD_AXIS

# Scores of a head in memory at once, of one sample, where they are: those of 1024 tokens with each other.
MAX_SCORES = 2**20

# What cuDNN's kernels take: a multiple of it up to the largest, and GPUs from Ampere on.
_HEAD_MULTIPLE, _LARGEST_HEAD, _LEAST_CAPABILITY = 8, 128, 8.0
# Fewer, such as the one of a token that is generated, have few scores; nor were fewer tried on a GPU.
_LEAST_QUERIES = 32


def attention(
    query: Array, key: Array, value: Array, visible: Array | None = None, *, is_causal: bool = False
) -> Array:
    """Softmax attention with grouped queries; the softmax is in float32.

    Args:
        query: [B, S, H, head].
        key: [B, T, G, head], with H a multiple of G.
        value: [B, T, G, head].
        visible: bool [B or 1, S, T], keys that a query sees; None: all, or those that `is_causal` leaves.
        is_causal: whether a query sees its own place and those before it, S = T; in place of `visible`.

    Returns:
        [B, S, H * head].
    """
    # XLA can't split cuDNN's kernels, so of several devices it must be known which: see `on_each_device`.
    known = jax.device_count() == 1 or not jax.sharding.get_abstract_mesh().empty
    if known and has_flash(query.dtype, query.shape[-1]) and query.shape[1] >= _LEAST_QUERIES:
        mixed = fused_attention(query, key, value, visible, is_causal=is_causal)
    else:
        mixed = _plain_attention(query, key, value, causal(query.shape[1]) if is_causal else visible)
    return checkpoint_name(mixed.reshape(*query.shape[:2], -1), "attention")


def causal(length: int) -> Array:
    """Which keys the queries of a sequence see, bool [1, T, T]: their own and those before."""
    return jnp.tril(jnp.ones((1, length, length), bool))


def has_flash(dtype: DTypeLike, head_dim: int) -> bool:
    """Whether this machine's devices and cuDNN have flash attention for heads of this dtype and width."""
    fits = jnp.dtype(dtype) == jnp.bfloat16 and head_dim % _HEAD_MULTIPLE == 0 and head_dim <= _LARGEST_HEAD
    return fits and _cuda_capability() >= _LEAST_CAPABILITY


@cache
def _cuda_capability() -> float:
    """Of the devices in use, such as 9.0; 0 of those that aren't NVIDIA's."""
    device = jax.devices()[0]
    if device.platform != "gpu":
        return 0.0
    try:
        return float(device.compute_capability)
    except ValueError:  # AMD's are names
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
    """Attention by one kernel of `jax.nn.dot_product_attention`, [B, S, H, head]; see `attention` for the arguments.

    The kernel's own rule for `jax.vmap` fails where lanes share a mask, or one of query, key and value; so lanes are
    laid into its batch here. For that its backward pass runs the forward kernel once more. JAX has it refuse odd
    lengths in training, so they are padded; no other query sees what is added.
    """

    def kernel(query: Array, key: Array, value: Array, *mask: Array) -> Array:
        length, keys = query.shape[1], key.shape[1]
        seen = lengths = None
        if mask:
            # Added queries see what the last one sees, so that their softmax is over something.
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


def on_each_device(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The function of arrays [B, S, H, head] and [B, ...], by each device for its own samples and heads.

    The mesh is known within a `jax.shard_map` over some of its axes, as `lanes.engine` has it; the others are made
    explicit here. Heads stay together where H or G isn't a multiple of the devices along `tensor`.
    """

    def spread(*arrays: Array) -> Any:
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.size <= 1:
            return kernel(*arrays)
        samples = _dividing(mesh, BATCH_AXES, [len(array) for array in arrays])
        heads = _dividing(mesh, (HEAD_AXIS,), [array.shape[2] for array in arrays if array.ndim == 4])

        def spec(array: Any) -> PartitionSpec:
            return PartitionSpec(samples, None, heads) if array.ndim == 4 else PartitionSpec(samples)

        # All axes, those that are explicit already too: only then JAX leaves the kernel as it is.
        return jax.shard_map(
            kernel,
            in_specs=tuple(map(spec, arrays)),
            out_specs=jax.tree.map(spec, jax.eval_shape(kernel, *arrays)),
            axis_names=set(mesh.axis_names),
            check_vma=False,
        )(*arrays)

    return spread


def _dividing(mesh: AbstractMesh, axes: tuple[str, ...], sizes: Sequence[int]) -> tuple[str, ...] | None:
    """Those of the axes that the mesh has, if their devices divide all sizes; else None, which splits nothing."""
    there = tuple(axis for axis in axes if axis in mesh.axis_names)
    parts = math.prod(mesh.shape[axis] for axis in there)
    return there if all(size % parts == 0 for size in sizes) else None


def lanes_in_batch(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The function of arrays [B, ...] so that `jax.vmap` over N lanes calls it once, with arrays [N * B, ...]."""
    mapped = custom_vmap(kernel)

    @mapped.def_vmap
    def once(lanes: int, is_mapped: list[bool], *arrays: Array) -> tuple[Any, Any]:
        def fold(array: Array, has_lanes: bool) -> Array:
            whole = array if has_lanes else jnp.broadcast_to(array[None], (lanes, *array.shape))
            return whole.reshape(-1, *whole.shape[2:])

        found = mapped(*map(fold, arrays, is_mapped))
        return jax.tree.map(lambda x: x.reshape(lanes, -1, *x.shape[1:]), found), jax.tree.map(lambda _: True, found)

    return mapped


def _of_even_length(x: Array) -> Array:
    """The array [B, S, ...] with a row of zeros more where S is odd."""
    return jnp.pad(x, [(0, x.shape[1] % 2 if axis == 1 else 0) for axis in range(x.ndim)])


def _plain_attention(query: Array, key: Array, value: Array, visible: Array | None) -> Array:
    """Attention by products of its own, [B, S, H, head].

    Of long sequences some queries are worked off at a time, and again in the backward pass, so that what scores take
    grows with the length and not with its square; `visible` itself is a byte for each query and key.
    """
    batch, length, heads, head_dim = query.shape
    keys, groups = key.shape[1:3]
    query = query.reshape(batch, length, groups, heads // groups, head_dim)
    if length * keys <= MAX_SCORES:
        return _attend(query, key, value, visible)
    rows = max(1, MAX_SCORES // keys)
    pieces = -(-length // rows)
    spare = pieces * rows - length
    seen = jnp.ones((1, length, keys), bool) if visible is None else visible

    def in_pieces(x: Array) -> Array:
        padded = jnp.pad(x, [(0, spare) if axis == 1 else (0, 0) for axis in range(x.ndim)])
        return padded.reshape(x.shape[0], pieces, rows, *x.shape[2:]).swapaxes(0, 1)

    piece = jax.checkpoint(lambda pair: _attend(pair[0], key, value, pair[1]))
    mixed = jax.lax.map(piece, (in_pieces(query), in_pieces(seen)))
    return mixed.swapaxes(0, 1).reshape(batch, pieces * rows, groups, -1, head_dim)[:, :length]


def _attend(query: Array, key: Array, value: Array, visible: Array | None) -> Array:
    """Attention of queries [B, S, G, H / G, head], in the same shape."""
    scores = jnp.einsum("btghd,bsgd->bghts", query, key).astype(jnp.float32) * query.shape[-1] ** -0.5
    if visible is not None:
        # Added, not selected: what a selection keeps for the backward pass is as large as the scores.
        scores += jnp.where(visible, 0.0, jnp.finfo(jnp.float32).min / 2)[:, None, None]
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("bghts,bsgd->btghd", weights, value)
