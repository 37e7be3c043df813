"""Parameter trees: nested dicts of arrays, and their "/"-joined paths."""

from collections.abc import Mapping
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array

Tree = dict[str, Any]
"""Nested dict of arrays, or of one other thing for each array, such as shardings."""


def flatten(tree: Mapping[str, object]) -> dict[str, Array]:
    """Leaves of a tree by "/"-joined path."""
    return flatten_dict(tree, sep="/")


def unflatten(flat: Mapping[str, object]) -> Tree:
    """The inverse of `flatten`."""
    return unflatten_dict(dict(flat), sep="/")


def subtree(tree: Mapping[str, object], path: str) -> dict[str, Array]:
    """The node of a tree at a "/"-joined path."""
    node: Tree = dict(tree)
    for part in path.split("/"):
        node = node[part]
    return node
