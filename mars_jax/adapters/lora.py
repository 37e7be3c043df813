"""LoRA as pytrees (Hu et al., arXiv 2106.09685): which linears, which ranks, init, the product, merge and unmerge.

It knows nothing of models, training or files, and works on any parameter tree. An adapter tree mirrors the parameter
tree: `{"llm": {"q_proj": {"a": [L?, in, R], "b": [L?, R, out], "scale": [L?]}}}`, with a leading axis L where layers
are stacked. Ranks may be traced: a tree padded to R columns whose columns from `rank` on are zero trains exactly as
the unpadded one under AdamW, SGD and Lion, because the gradients of those columns are zero.

On a plain pytree:

>>> import jax, jax.numpy as jnp
>>> from mars_jax.adapters.targets import find_targets
>>> params = {"llm": {"q_proj": {"kernel": jnp.ones((8, 6))}, "norm": {"scale": jnp.ones(8)}}}
>>> targets = find_targets(params, {"llm": [r"llm/.*_proj"]})
>>> adapters = init_adapters(jax.random.key(0), targets, {"llm": 4})
>>> {path: leaf.shape for path, leaf in flatten(adapters).items()}
{'llm/q_proj/a': (8, 4), 'llm/q_proj/b': (4, 6), 'llm/q_proj/scale': ()}
>>> bool((merge(params, adapters)["llm"]["q_proj"]["kernel"] == 1).all())  # b starts at zero
True

On a Linen model, whose dense layers call `lora_dense` with the leaves of a `lora` collection:

>>> from flax import linen as nn
>>> class Dense(nn.Module):
...     @nn.compact
...     def __call__(self, x):
...         kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], 6))
...         names = ("a", "b", "scale")
...         found = self.has_variable("lora", "a")
...         adapter = {name: self.get_variable("lora", name) for name in names} if found else None
...         return lora_dense(x, kernel, None, adapter)
>>> class Model(nn.Module):
...     @nn.compact
...     def __call__(self, x):
...         return Dense(name="head")(x)
>>> base = Model().init(jax.random.key(0), jnp.ones((2, 8)))["params"]
>>> adapters = init_adapters(jax.random.key(1), find_targets(base, {"llm": ["head"]}), {"llm": 2})
>>> Model().apply({"params": base, "lora": adapters}, jnp.ones((2, 8))).shape
(2, 6)
"""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

from mars_jax.adapters.targets import Targets
from mars_jax.runtime.trees import Tree, flatten, subtree, unflatten

Rank = int | Array


@dataclass(frozen=True, slots=True)
class AlphaRule:
    """How the scale of an adapter follows from its rank; part of every result.

    `proportional`: alpha = value * r, so the scale is `value` whatever the rank (default, alpha = 2r).
    `fixed`: alpha = value, so the scale is value / r. `rslora`: value / sqrt(r) (Kalajdzievski, arXiv 2312.03732).
    """

    rule: Literal["proportional", "fixed", "rslora"] = "proportional"
    value: float = 2.0

    def scale(self, rank: Rank) -> Array:
        """Scale [] for a rank, traced or not; 0 for rank 0 (a frozen module)."""
        r = jnp.asarray(rank, jnp.float32)
        divisor = {"proportional": jnp.ones_like(r), "fixed": r, "rslora": jnp.sqrt(r)}[self.rule]
        return jnp.where(r > 0, self.value / jnp.maximum(divisor, 1.0), 0.0)


def init_adapters(
    key: Array,
    targets: Targets,
    ranks: Mapping[str, Rank],
    alpha: AlphaRule = AlphaRule(),
    padded_ranks: Mapping[str, int] | None = None,
) -> Tree:
    """Draws adapters as PEFT does: a ~ U(-1/sqrt(in), 1/sqrt(in)), b = 0.

    Column j of `a` depends on the key, the path, the layer and j alone: rank 4 is the first four columns of rank 64,
    and neither padding nor other targets change a draw.

    Args:
        key: a typed PRNG key.
        targets: from `find_targets`.
        ranks: module -> rank; may be traced when `padded_ranks` is given. 0 freezes a module.
        alpha: the alpha rule.
        padded_ranks: module -> columns R to allocate (default: the ranks themselves).

    Returns:
        The adapter tree, float32.
    """
    # Linears of one shape are drawn together, in a loop: it compiles ten times faster than a draw for each.
    alike: dict[tuple[int | None, int, int], list[str]] = {}
    for path, target in targets.items():
        columns = (padded_ranks or ranks)[target.module]
        if not isinstance(columns, int):
            raise TypeError(f"init_adapters: traced rank of module {target.module!r} needs padded_ranks")
        if columns:
            alike.setdefault((target.num_layers, target.d_in, columns), []).append(path)
    flat: dict[str, Array] = {}
    for (num_layers, d_in, columns), paths in alike.items():
        checksums = jnp.asarray([zlib.crc32(path.encode()) for path in paths], jnp.uint32)
        draws = _draw(key, checksums, layers=num_layers or 1, columns=columns, d_in=d_in)
        for path, draw in zip(paths, draws, strict=True):
            target, rank = targets[path], ranks[targets[path].module]
            a = draw * rank_mask(columns, rank)[None, None, :]
            b = jnp.zeros((len(a), columns, target.d_out))
            scale = jnp.broadcast_to(alpha.scale(rank), (len(a),))
            for name, leaf in (("a", a), ("b", b), ("scale", scale)):
                flat[f"{path}/{name}"] = leaf if num_layers else leaf[0]
    return unflatten(flat)


@partial(jax.jit, static_argnames=("layers", "columns", "d_in"))
def _draw(key: Array, checksums: Array, *, layers: int, columns: int, d_in: int) -> Array:
    """Draws U(-1/sqrt(in), 1/sqrt(in)) [N, L, in, R] for N paths; every column has its own key."""

    def column(place: Array) -> Array:
        path, layer, j = place
        own = jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(key, path), layer), j)
        # Rounds once, so that every program that holds this draw has the same bits.
        return jax.random.uniform(own, (d_in,), jnp.float32, -1.0, 1.0) * d_in**-0.5

    counts = [jnp.arange(count, dtype=jnp.uint32) for count in (layers, columns)]
    places = jnp.stack(jnp.meshgrid(checksums, *counts, indexing="ij"), axis=-1).reshape(-1, 3)
    return jax.lax.map(column, places).reshape(len(checksums), layers, columns, d_in).swapaxes(2, 3)


def rank_mask(columns: int, rank: Rank) -> Array:
    """float32 [columns], 1 where the column is below the rank."""
    return (jnp.arange(columns) < rank).astype(jnp.float32)


def lora_dense(x: Array, kernel: Array, bias: Array | None, adapter: Mapping[str, Array] | None) -> Array:
    """`y = x W + bias + scale * ((x A) B)`: the one dense product of every module.

    Args:
        x: [..., in].
        kernel: [in, out], cast to the dtype of x.
        bias: [out] or None.
        adapter: leaves a [in, R], b [R, out], scale [], or None for the base alone.

    Returns:
        [..., out] in the dtype of x.
    """
    rows = x.reshape(-1, x.shape[-1])  # one flat product: fast on every backend, also under vmap over adapters
    y = rows @ kernel.astype(x.dtype)
    if bias is not None:
        y = y + bias[None].astype(x.dtype)
    if adapter is not None:
        low = (rows @ adapter["a"].astype(x.dtype)) @ adapter["b"].astype(x.dtype)
        y = y + low * adapter["scale"].astype(x.dtype)
    return y.reshape(*x.shape[:-1], -1)


def split_trainable(adapters: Mapping[str, Any]) -> tuple[Tree, Tree]:
    """Splits adapters into what trains (a, b) and the scales, which an optimizer must neither decay nor train."""
    flat = flatten(adapters)
    is_scale = {path: path.endswith("/scale") for path in flat}
    trainable = unflatten({path: leaf for path, leaf in flat.items() if not is_scale[path]})
    return trainable, unflatten({path: leaf for path, leaf in flat.items() if is_scale[path]})


def join_trainable(trainable: Mapping[str, Any], scales: Mapping[str, Any]) -> Tree:
    """Inverse of `split_trainable`."""
    return unflatten({**flatten(trainable), **flatten(scales)})


def trim(adapters: Mapping[str, Any], targets: Targets, ranks: Mapping[str, int]) -> Tree:
    """Cuts the padding off: R becomes the rank; modules of rank 0 leave the tree."""
    flat: dict[str, Array] = {}
    for path, target in targets.items():
        rank = ranks[target.module]
        if rank:
            leaves = subtree(adapters, path)
            flat |= {
                f"{path}/a": leaves["a"][..., :rank],
                f"{path}/b": leaves["b"][..., :rank, :],
                f"{path}/scale": leaves["scale"],
            }
    return unflatten(flat)


def delta(leaves: Mapping[str, Array]) -> Array:
    """The weight update `scale * A B` of one linear, float32 [L?, in, out]."""
    return leaves["scale"][..., None, None] * jnp.matmul(leaves["a"], leaves["b"], precision="highest")


def merge(params: Mapping[str, Any], adapters: Mapping[str, Any], weight_name: str | None = "kernel") -> Tree:
    """Adds every update to its weight, in float32, and returns the tree in the dtypes of `params`."""
    return _add_deltas(params, adapters, weight_name, sign=1.0)


def unmerge(params: Mapping[str, Any], adapters: Mapping[str, Any], weight_name: str | None = "kernel") -> Tree:
    """Inverse of `merge`, up to rounding in the dtype of `params`."""
    return _add_deltas(params, adapters, weight_name, sign=-1.0)


def _add_deltas(params: Mapping[str, Any], adapters: Mapping[str, Any], weight_name: str | None, sign: float) -> Tree:
    flat = flatten(params)
    for path in {path.rpartition("/")[0] for path in flatten(adapters)}:
        weight_path = path if weight_name is None else f"{path}/{weight_name}"
        weight = flat[weight_path]
        flat[weight_path] = (weight.astype(jnp.float32) + sign * delta(subtree(adapters, path))).astype(weight.dtype)
    return unflatten(flat)
