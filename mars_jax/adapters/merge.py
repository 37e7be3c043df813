"""Adding adapters to the weights of a parameter tree, and taking them off again."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from mars_jax.adapters.lora import LORA
from mars_jax.adapters.method import AdapterMethod, AnyArray, AnyLeaves
from mars_jax.errors import ConfigError
from mars_jax.runtime.trees import Tree, flatten, subtree, unflatten


def merge(
    params: Mapping[str, Any],
    adapters: Mapping[str, Any],
    weight_name: str | None = "kernel",
    method: AdapterMethod = LORA,
) -> Tree:
    """Adds every update to its weight, in float32, and returns the tree in the dtypes of `params`.

    Args:
        params: the parameter tree.
        adapters: the adapter tree, padded or not.
        weight_name: name of the weight leaf under a linear's path; None where the leaf itself is the weight.
        method: the adapter method.

    Raises:
        ConfigError: a method whose adapters can't be added to weights.
    """
    return _add_deltas(params, adapters, weight_name, method, sign=1.0)


def unmerge(
    params: Mapping[str, Any],
    adapters: Mapping[str, Any],
    weight_name: str | None = "kernel",
    method: AdapterMethod = LORA,
) -> Tree:
    """Inverse of `merge`, up to rounding in the dtype of `params`; for methods whose delta doesn't read the weight."""
    return _add_deltas(params, adapters, weight_name, method, sign=-1.0)


def delta_of(method: AdapterMethod, kernel: AnyArray, leaves: AnyLeaves) -> AnyArray:
    """What the adapter of one linear adds to its weight [L?, in, out], float32; numpy where the leaves are.

    Raises:
        ConfigError: a method whose adapters can't be added to weights.
    """
    delta = method.delta(kernel, leaves)
    if delta is None:
        raise ConfigError(
            f"adapter method {method.name!r} computes what no addition to the weights gives, so its adapters can't be "
            f"merged. Keep them beside the base, or train with a method that can be merged, such as lora."
        )
    return delta


def _add_deltas(
    params: Mapping[str, Any],
    adapters: Mapping[str, Any],
    weight_name: str | None,
    method: AdapterMethod,
    sign: float,
) -> Tree:
    flat = flatten(params)
    for path in {path.rpartition("/")[0] for path in flatten(adapters)}:
        weight_path = path if weight_name is None else f"{path}/{weight_name}"
        weight = flat[weight_path]
        delta = delta_of(method, weight, subtree(adapters, path))
        flat[weight_path] = (weight.astype(jnp.float32) + sign * delta).astype(weight.dtype)
    return unflatten(flat)
