"""Sizes of adapter updates by module: Frobenius norms and relative changes."""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from jax import Array

from mars_jax.adapters.targets import Targets
from mars_jax.runtime.trees import flatten, subtree


def update_norms(adapters: Mapping[str, Any], targets: Targets) -> dict[str, Array]:
    """Frobenius norm of `scale * A B` by module, float32 []; norms of A and B alone mean nothing.

    Computed from R x R Gram matrices, so the product is never formed.
    """
    totals = _by_module(targets, adapters, (), lambda path: _inner(subtree(adapters, path), subtree(adapters, path)))
    return {module: jnp.sqrt(jnp.maximum(total, 0.0)) for module, total in totals.items()}


def relative_change(new: Mapping[str, Any], old: Mapping[str, Any], targets: Targets) -> dict[str, Array]:
    """`||Delta_new - Delta_old|| / ||Delta_new||` by module, float32 []; NaN while a module has not moved."""

    def squares(path: str) -> Array:
        after, before = subtree(new, path), subtree(old, path)
        difference = {
            "a": jnp.concatenate([after["a"], before["a"]], axis=-1),
            "b": jnp.concatenate([after["b"], -before["b"]], axis=-2),
            "scale": after["scale"],
        }
        return jnp.stack([_inner(difference, difference), _inner(after, after)])

    totals = _by_module(targets, new, (2,), squares)
    return {module: jnp.sqrt(jnp.maximum(total[0], 0.0) / total[1]) for module, total in totals.items()}


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
