"""LoRA (Hu et al., arXiv 2106.09685): `y = x W + bias + scale * ((x A) B)`, with A and B trained.

The leaves of a linear are `{"a": [L?, in, R], "b": [L?, R, out], "scale": [L?]}`, with a leading axis L where layers
are stacked. Ranks may be traced: adapters padded to R columns whose columns from `rank` on are zero train exactly as
the unpadded ones under AdamW, SGD and Lion, because the gradients of those columns are zero.

On a plain pytree:

>>> import jax, jax.numpy as jnp
>>> from mars_jax.adapters.merge import merge
>>> from mars_jax.adapters.targets import find_targets
>>> from mars_jax.adapters.tree import init_adapters
>>> from mars_jax.runtime.trees import flatten
>>> params = {"llm": {"q_proj": {"kernel": jnp.ones((8, 6))}, "norm": {"scale": jnp.ones(8)}}}
>>> targets = find_targets(params, {"llm": [r"llm/.*_proj"]})
>>> adapters = init_adapters(jax.random.key(0), targets, {"llm": 4})
>>> {path: leaf.shape for path, leaf in flatten(adapters).items()}
{'llm/q_proj/a': (8, 4), 'llm/q_proj/b': (4, 6), 'llm/q_proj/scale': ()}
>>> bool((merge(params, adapters)["llm"]["q_proj"]["kernel"] == 1).all())  # b starts at zero
True

On a Linen model, whose dense layers call `lora_dense` with the leaves of a `lora` collection (those of
`mars_jax.models.layers` do so for every method):

>>> from flax import linen as nn
>>> class Dense(nn.Module):
...     @nn.compact
...     def __call__(self, x):
...         kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], 6))
...         return lora_dense(x, kernel, None, self.variables.get("lora"))
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
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mars_jax.adapters.method import (
    AdapterMethod,
    AnyArray,
    AnyLeaves,
    Context,
    Leaf,
    Leaves,
    MethodSettings,
    PeftFormat,
    PeftTensor,
    Rank,
    dense,
)
from mars_jax.adapters.targets import Target, Targets
from mars_jax.runtime.trees import Tree, unflatten


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


@dataclass(frozen=True)
class Lora(AdapterMethod):
    """Low-rank updates.

    Attributes:
        alpha: the alpha rule.
    """

    alpha: AlphaRule = AlphaRule()

    name = "lora"
    has_ranks = True
    padding_is_exact = True

    def configured(self, settings: MethodSettings) -> "Lora":
        """LoRA with the alpha rule of a run."""
        return Lora(settings.alpha)

    def leaves(self, target: Target, columns: int) -> dict[str, Leaf]:
        """A and B, and the scale of the alpha rule."""
        if not columns:
            return {}
        layers = () if target.num_layers is None else (target.num_layers,)
        return {
            "a": Leaf((*layers, target.d_in, columns)),
            "b": Leaf((*layers, columns, target.d_out)),
            "scale": Leaf(layers, trained=False),
        }

    def init(
        self,
        key: Array,
        targets: Targets,
        ranks: Mapping[str, Rank],
        columns: Mapping[str, int],
        kernels: Mapping[str, Array],
    ) -> Tree:
        """Draws adapters as PEFT does: a ~ U(-1/sqrt(in), 1/sqrt(in)), b = 0.

        Column j of `a` depends on the key, the path, the layer and j alone: rank 4 is the first four columns of rank
        64, and neither padding nor other targets change a draw.
        """
        # Linears of one shape are drawn together, in a loop: it compiles ten times faster than a draw for each.
        alike: dict[tuple[int | None, int, int], list[str]] = {}
        for path, target in targets.items():
            if columns[target.module]:
                alike.setdefault((target.num_layers, target.d_in, columns[target.module]), []).append(path)
        flat: dict[str, Array] = {}
        for (num_layers, d_in, width), paths in alike.items():
            checksums = jnp.asarray([zlib.crc32(path.encode()) for path in paths], jnp.uint32)
            draws = _draw(key, checksums, layers=num_layers or 1, columns=width, d_in=d_in)
            for path, draw in zip(paths, draws, strict=True):
                target, rank = targets[path], ranks[targets[path].module]
                a = draw * rank_mask(width, rank)[None, None, :]
                b = jnp.zeros((len(a), width, target.d_out))
                scale = jnp.broadcast_to(self.alpha.scale(rank), (len(a),))
                for name, leaf in (("a", a), ("b", b), ("scale", scale)):
                    flat[f"{path}/{name}"] = leaf if num_layers else leaf[0]
        return unflatten(flat)

    def fixed(self, rank: Rank) -> dict[str, Array]:
        """The scale []."""
        return {"scale": self.alpha.scale(rank)}

    def apply(self, x: Array, kernel: Array, bias: Array | None, leaves: Leaves, context: Context) -> Array:
        """See `lora_dense`."""
        return lora_dense(x, kernel, bias, leaves)

    def delta(self, kernel: AnyArray | None, leaves: AnyLeaves) -> AnyArray:
        """`scale * A B`."""
        a, b = leaves["a"], leaves["b"]
        product = np.matmul(a, b) if isinstance(a, np.ndarray) else jnp.matmul(a, b, precision="highest")
        return leaves["scale"][..., None, None] * product

    def squared_norm(self, kernel: Array | None, leaves: Leaves) -> Array:
        """From R x R Gram matrices, so the product is never formed."""
        return _inner(leaves, leaves)

    def squared_change(self, kernel: Array | None, new: Leaves, old: Leaves) -> Array:
        """The norm of a product of twice the rank: `[A_new, A_old] [B_new; -B_old]`."""
        difference = {
            "a": jnp.concatenate([new["a"], old["a"]], axis=-1),
            "b": jnp.concatenate([new["b"], -old["b"]], axis=-2),
            "scale": new["scale"],
        }
        return _inner(difference, difference)

    def flops(self, target: Target, rank: int, rows: float, *, trains: bool, moves: bool) -> float:
        """Forward `x A` and `(x A) B`; backward to B, to `x A` and to A, and to x where it moves."""
        d_in, d_out = target.d_in, target.d_out
        return 2.0 * rows * rank * ((d_in + d_out) + trains * (2 * d_out + d_in) + (trains and moves) * d_in)

    def peft(self) -> PeftFormat:
        """`LoraConfig`."""
        return PeftFormat(
            "LORA",
            {"a": PeftTensor("lora_A", rank_axis=-1), "b": PeftTensor("lora_B", rank_axis=-2)},
            scale="scale",
            settings={"lora_dropout": 0.0, "use_rslora": False},
        )


LORA = Lora()


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


def _inner(left: Leaves, right: Leaves) -> Array:
    """Frobenius inner product of two updates, summed over layers, through their Gram matrices."""
    # Full precision: the small norm of a difference is what remains when large products cancel.
    a = jnp.einsum("...ir,...is->...rs", left["a"], right["a"], precision="highest")
    b = jnp.einsum("...ro,...so->...rs", left["b"], right["b"], precision="highest")
    return jnp.sum(left["scale"] * right["scale"] * (a * b).sum((-2, -1)))


def rank_mask(columns: int, rank: Rank) -> Array:
    """float32 [columns], 1 where the column is below the rank."""
    return (jnp.arange(columns) < rank).astype(jnp.float32)


def lora_dense(x: Array, kernel: Array, bias: Array | None, adapter: Leaves | None) -> Array:
    """`y = x W + bias + scale * ((x A) B)`.

    Args:
        x: [..., in].
        kernel: [in, out], cast to the dtype of x.
        bias: [out] or None.
        adapter: leaves a [in, R], b [R, out], scale [], or None for the base alone.

    Returns:
        [..., out] in the dtype of x.
    """
    rows = x.reshape(-1, x.shape[-1])
    y = dense(rows, kernel, bias)
    if adapter is not None:
        low = (rows @ adapter["a"].astype(x.dtype)) @ adapter["b"].astype(x.dtype)
        y = y + low * adapter["scale"].astype(x.dtype)
    return y.reshape(*x.shape[:-1], -1)
