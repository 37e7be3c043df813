"""Adapter trees of any method: drawing, splitting, trimming and padding them.

Pure functions that know nothing of models, training or files. They take a method and default to LoRA.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jax import Array

from mars_jax.adapters.lora import LORA
from mars_jax.adapters.method import AdapterMethod, Rank, leaf_names
from mars_jax.adapters.targets import Targets
from mars_jax.runtime.trees import Tree, flatten, subtree, unflatten


def init_adapters(
    key: Array,
    targets: Targets,
    ranks: Mapping[str, Rank],
    method: AdapterMethod = LORA,
    padded_ranks: Mapping[str, int] | None = None,
    kernels: Mapping[str, Array] | None = None,
) -> Tree:
    """Draws fresh adapters, which change nothing.

    Args:
        key: a typed PRNG key.
        targets: from `find_targets`.
        ranks: module -> rank; may be traced when `padded_ranks` is given. 0 freezes a module.
        method: the adapter method.
        padded_ranks: module -> columns R to allocate (default: the ranks themselves).
        kernels: path -> frozen weight, for methods that start from it: see `kernels_of`.

    Returns:
        The adapter tree, float32.
    """
    columns = {}
    for target in targets.values():
        count = (padded_ranks or ranks)[target.module]
        if not isinstance(count, int):
            raise TypeError(f"init_adapters: traced rank of module {target.module!r} needs padded_ranks")
        columns[target.module] = count
    return method.init(key, targets, ranks, columns, kernels or {})


def kernels_of(params: Mapping[str, Any], targets: Targets) -> dict[str, Array]:
    """Path -> frozen weight [L?, in, out], for targets whose weight is a leaf `kernel`."""
    nodes = {path: subtree(params, path) for path in targets}
    return {path: node["kernel"] for path, node in nodes.items() if "kernel" in node}


def split_trainable(adapters: Mapping[str, Any], method: AdapterMethod = LORA) -> tuple[Tree, Tree]:
    """Splits adapters into the leaves that train and those that an optimizer must neither decay nor train."""
    flat, trains = flatten(adapters), leaf_names(method)
    is_trained = {path: trains[path.rpartition("/")[2]] for path in flat}
    trained = unflatten({path: leaf for path, leaf in flat.items() if is_trained[path]})
    return trained, unflatten({path: leaf for path, leaf in flat.items() if not is_trained[path]})


def join_trainable(trained: Mapping[str, Any], untrained: Mapping[str, Any]) -> Tree:
    """Inverse of `split_trainable`."""
    return unflatten({**flatten(trained), **flatten(untrained)})


def trim(adapters: Mapping[str, Any], targets: Targets, ranks: Mapping[str, int], method: AdapterMethod = LORA) -> Tree:
    """Cuts the padding off: leaves get the shapes of the ranks; modules of rank 0 leave the tree."""
    flat: dict[str, Array] = {}
    for path, target in targets.items():
        rank = ranks[target.module]
        leaves = subtree(adapters, path) if rank else {}
        for name, leaf in method.leaves(target, rank).items():
            whole = leaves[name]
            flat[f"{path}/{name}"] = whole if whole.shape == leaf.shape else whole[tuple(map(slice, leaf.shape))]
    return unflatten(flat)


def pad(
    adapters: Mapping[str, Any], targets: Targets, columns: Mapping[str, int], method: AdapterMethod = LORA
) -> Tree:
    """Inverse of `trim`, on the host: leaves get the shapes of `columns`, filled with zeros; so do those that lack."""
    flat, padded = flatten(adapters), {}
    for path, target in targets.items():
        for name, leaf in method.leaves(target, columns[target.module]).items():
            whole = np.zeros(leaf.shape, np.float32)
            part = np.asarray(flat.get(f"{path}/{name}", whole))
            whole[tuple(map(slice, part.shape))] = part
            padded[f"{path}/{name}"] = whole
    return unflatten(padded)
