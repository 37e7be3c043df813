"""Trees of parameters by path."""

from collections.abc import Mapping
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array

Tree = dict[str, Any]


def flatten(tree: Mapping[str, Any]) -> dict[str, Array]:
    """Maps "/"-joined paths to leaves."""
    return flatten_dict(tree, sep="/")


def unflatten(flat: Mapping[str, Any]) -> Tree:
    """Inverse of `flatten`."""
    return unflatten_dict(dict(flat), sep="/")


def subtree(adapters: Mapping[str, Any], path: str) -> dict[str, Array]:
    """The node at a "/"-joined path."""
    node: Any = adapters
    for part in path.split("/"):
        node = node[part]
    return node
