"""LoRA as pytrees (Hu et al., arXiv 2106.09685): which linears, which ranks, init, the product, merge and unmerge.

It knows nothing of models, training or files, and works on any parameter tree. An adapter tree mirrors the parameter
tree: `{"llm": {"q_proj": {"a": [L?, in, R], "b": [L?, R, out], "scale": [L?]}}}`, with a leading axis L where layers
are stacked. Ranks may be traced: a tree padded to R columns whose columns from `rank` on are zero trains exactly as
the unpadded one under AdamW, SGD and Lion, because the gradients of those columns are zero.

On a plain pytree:

>>> import jax, jax.numpy as jnp
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

import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array

from mars_jax.errors import ConfigError

Tree = dict[str, Any]
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


@dataclass(frozen=True, slots=True)
class Target:
    """A linear that takes an adapter: its module, and its shape [num_layers?, d_in, d_out]."""

    module: str
    num_layers: int | None
    d_in: int
    d_out: int

    @property
    def parameters_per_rank(self) -> int:
        """LoRA parameters for each unit of rank."""
        return (self.num_layers or 1) * (self.d_in + self.d_out)


Targets = dict[str, Target]


def flatten(tree: Mapping[str, Any]) -> dict[str, Array]:
    """Maps "/"-joined paths to leaves."""
    return flatten_dict(tree, sep="/")


def unflatten(flat: Mapping[str, Any]) -> Tree:
    """Inverse of `flatten`."""
    return unflatten_dict(dict(flat), sep="/")


def find_targets(
    params: Mapping[str, Any], patterns: Mapping[str, Sequence[str]], weight_name: str | None = "kernel"
) -> Targets:
    """Resolves target patterns to full paths.

    Args:
        params: the parameter tree; arrays or `ShapeDtypeStruct`s.
        patterns: module -> regular expressions, each of which must match whole paths such as
            "llm/layers/self_attn/q_proj".
        weight_name: name of the weight leaf under a linear's path; None where the leaf itself is the weight.

    Returns:
        Path -> `Target`, in the order of the tree.

    Raises:
        ConfigError: a pattern that is not a regular expression or matches nothing, or a path that two modules claim.
    """
    linears = {}
    for path, leaf in flatten(params).items():
        stem, _, name = path.rpartition("/")
        if leaf.ndim in (2, 3) and weight_name in (None, name):
            linears[path if weight_name is None else stem] = leaf.shape
    targets: Targets = {}
    for module, expressions in patterns.items():
        for expression in expressions:
            try:
                hits = [path for path in linears if re.fullmatch(expression, path)]
            except re.error as error:
                raise ConfigError(
                    f"lora: pattern {expression!r} of module {module!r} is not a regular expression: {error}. "
                    f"Write one that matches whole paths, such as 'llm/layers/self_attn/(q|v)_proj'."
                ) from None
            if not hits:
                near = get_close_matches(expression, linears, n=3, cutoff=0.0)
                raise ConfigError(
                    f"lora: pattern {expression!r} of module {module!r} matches none of the {len(linears)} linears. "
                    f"A pattern must match a whole path; nearest: {', '.join(near)}."
                )
            for path in hits:
                if path in targets and targets[path].module != module:
                    raise ConfigError(
                        f"lora: {path!r} is claimed by the modules {targets[path].module!r} and {module!r}. "
                        f"Make their patterns disjoint."
                    )
                *layers, d_in, d_out = linears[path]
                targets[path] = Target(module, layers[0] if layers else None, d_in, d_out)
    return {path: targets[path] for path in linears if path in targets}


def check_ranks(targets: Targets, ranks: Mapping[str, int]) -> None:
    """Refuses ranks that mean nothing.

    Raises:
        ConfigError: a module without targets or a target without a rank, a negative rank, a rank beyond a linear's
            width, or ranks that leave nothing to train.
    """
    modules = {target.module for target in targets.values()}
    if set(ranks) != modules:
        raise ConfigError(
            f"lora: ranks name the modules {sorted(ranks)}; the targets have {sorted(modules)}. "
            f"Give each of them one rank, 0 to freeze it."
        )
    if not any(ranks.values()):
        raise ConfigError(f"lora: every rank is 0 ({dict(ranks)}), so nothing would train. Give one module a rank > 0.")
    for module, rank in ranks.items():
        if rank < 0:
            raise ConfigError(f"lora: rank {rank} of module {module!r} is negative. Use 0 to freeze the module.")
        path, width = min(
            ((path, min(t.d_in, t.d_out)) for path, t in targets.items() if t.module == module),
            key=lambda pair: pair[1],
        )
        if rank > width:
            raise ConfigError(
                f"lora: rank {rank} of module {module!r} is beyond the width {width} of {path!r}. "
                f"Allowed: 0 to {width}; or leave that linear out of the targets."
            )


def parameters_per_rank(targets: Targets) -> dict[str, int]:
    """LoRA parameters for each unit of rank, by module."""
    totals: dict[str, int] = {}
    for target in targets.values():
        totals[target.module] = totals.get(target.module, 0) + target.parameters_per_rank
    return totals


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
            leaves = _leaves(adapters, path)
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


def update_norms(adapters: Mapping[str, Any], targets: Targets) -> dict[str, Array]:
    """Frobenius norm of `scale * A B` by module, float32 []; norms of A and B alone mean nothing.

    Computed from R x R Gram matrices, so the product is never formed.
    """
    totals = _by_module(targets, adapters, (), lambda path: _inner(_leaves(adapters, path), _leaves(adapters, path)))
    return {module: jnp.sqrt(jnp.maximum(total, 0.0)) for module, total in totals.items()}


def relative_change(new: Mapping[str, Any], old: Mapping[str, Any], targets: Targets) -> dict[str, Array]:
    """`||Delta_new - Delta_old|| / ||Delta_new||` by module, float32 []; NaN while a module has not moved."""

    def squares(path: str) -> Array:
        after, before = _leaves(new, path), _leaves(old, path)
        difference = {
            "a": jnp.concatenate([after["a"], before["a"]], axis=-1),
            "b": jnp.concatenate([after["b"], -before["b"]], axis=-2),
            "scale": after["scale"],
        }
        return jnp.stack([_inner(difference, difference), _inner(after, after)])

    totals = _by_module(targets, new, (2,), squares)
    return {module: jnp.sqrt(jnp.maximum(total[0], 0.0) / total[1]) for module, total in totals.items()}


def _leaves(adapters: Mapping[str, Any], path: str) -> dict[str, Array]:
    node: Any = adapters
    for part in path.split("/"):
        node = node[part]
    return node


def _inner(left: Mapping[str, Array], right: Mapping[str, Array]) -> Array:
    """Frobenius inner product of two updates, summed over layers, through their Gram matrices."""
    # Full precision: the small norm of a difference is what remains when large products cancel.
    a = jnp.einsum("...ir,...is->...rs", left["a"], right["a"], precision="highest")
    b = jnp.einsum("...ro,...so->...rs", left["b"], right["b"], precision="highest")
    return jnp.sum(left["scale"] * right["scale"] * (a * b).sum((-2, -1)))


def _by_module(
    targets: Targets, adapters: Mapping[str, Any], shape: tuple[int, ...], value: Callable[[str], Array]
) -> dict[str, Array]:
    """Sums `value` [*shape] over the paths of each module; 0 for a module that has no columns."""
    totals = {target.module: jnp.zeros(shape) for target in targets.values()}
    for path in {path.rpartition("/")[0]: None for path in flatten(adapters)}:
        totals[targets[path].module] += value(path)
    return totals


def _add_deltas(params: Mapping[str, Any], adapters: Mapping[str, Any], weight_name: str | None, sign: float) -> Tree:
    flat = flatten(params)
    for path in {path.rpartition("/")[0] for path in flatten(adapters)}:
        weight_path = path if weight_name is None else f"{path}/{weight_name}"
        weight = flat[weight_path]
        flat[weight_path] = (weight.astype(jnp.float32) + sign * delta(_leaves(adapters, path))).astype(weight.dtype)
    return unflatten(flat)
