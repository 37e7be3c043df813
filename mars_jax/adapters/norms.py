"""Sizes of adapter updates by module: Frobenius norms and relative changes."""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from jax import Array

from mars_jax.adapters.lora import LORA
from mars_jax.adapters.method import AdapterMethod
from mars_jax.adapters.targets import Targets
from mars_jax.runtime.trees import flatten, subtree

_NO_KERNELS: Mapping[str, Array] = {}


def update_norms(
    adapters: Mapping[str, Any],
    targets: Targets,
    method: AdapterMethod = LORA,
    kernels: Mapping[str, Array] = _NO_KERNELS,
) -> dict[str, Array]:
    """Frobenius norm of the updates by module, float32 []; norms of single leaves, such as A and B, mean nothing.

    Args:
        adapters: the adapter tree.
        targets: the linears that take adapters.
        method: the adapter method.
        kernels: path -> frozen weight, for methods whose update depends on it: see `tree.kernels_of`.
    """

    def square(path: str) -> Array:
        return method.squared_norm(kernels.get(path), subtree(adapters, path))

    totals = _by_module(targets, adapters, (), square)
    return {module: jnp.sqrt(jnp.maximum(total, 0.0)) for module, total in totals.items()}


def relative_change(
    new: Mapping[str, Any],
    old: Mapping[str, Any],
    targets: Targets,
    method: AdapterMethod = LORA,
    kernels: Mapping[str, Array] = _NO_KERNELS,
) -> dict[str, Array]:
    """`||Delta_new - Delta_old|| / ||Delta_new||` by module, float32 []; NaN while a module has not moved.

    Args:
        new: an adapter tree.
        old: another, of the same shapes.
        targets: the linears that take adapters.
        method: the adapter method.
        kernels: as in `update_norms`.
    """

    def squares(path: str) -> Array:
        kernel, after, before = kernels.get(path), subtree(new, path), subtree(old, path)
        return jnp.stack([method.squared_change(kernel, after, before), method.squared_norm(kernel, after)])

    totals = _by_module(targets, new, (2,), squares)
    return {module: jnp.sqrt(jnp.maximum(total[0], 0.0) / total[1]) for module, total in totals.items()}


def _by_module(
    targets: Targets, adapters: Mapping[str, Any], shape: tuple[int, ...], value: Callable[[str], Array]
) -> dict[str, Array]:
    """Sums `value` [*shape] over the paths of each module; 0 for a module that has no columns."""
    totals = {target.module: jnp.zeros(shape) for target in targets.values()}
    for path in {path.rpartition("/")[0]: None for path in flatten(adapters)}:
        totals[targets[path].module] += value(path)
    return totals
