"""Shardings over a device mesh: of parameters by rules, of batches and of lanes.

Sharding is automatic: these are shardings of arguments for `jax.jit`, and XLA adds the communication. The rules for the
parameters of models are in `models.shardings`. Nothing here assumes that one process can address all devices.

    mesh = make_mesh({"fsdp": -1, "tensor": 2})
    rules = [(r".*/kernel", ("fsdp", "tensor")), (r".*/bias", ("tensor",))]
    parameters = place(parameters, split_by_rules(shapes, mesh, rules))
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import TypeVar, overload

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mars_jax.errors import ConfigError
from mars_jax.runtime.trees import Tree, unflatten

AXES = ("lane", "data", "fsdp", "tensor")
REST = -1

# Mesh axes that split samples, and the one that splits attention heads.
BATCH_AXES, HEAD_AXIS = ("data", "fsdp"), "tensor"

Axis = str | tuple[str, ...] | None
"""The mesh axis that splits a dimension, several that split it together, or None."""

Rule = tuple[str, tuple[Axis, ...]]
"""(regular expression over whole "/"-joined paths of parameters, axis that splits each of their dimensions).

The leading axis of layers, of paths with `/layers/`, is not listed and is never split."""

Pytree = TypeVar("Pytree")

_LAYERS = "/layers/"


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Makes a device mesh with the axes `AXES`.

    Args:
        sizes: axis -> devices along it; 1 for axes not named. One may be `REST`, all that remain.
        devices: the devices, all of which are used; None: those of all processes.

    Raises:
        ConfigError: an unknown axis, or sizes whose product is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    unknown = [axis for axis in sizes if axis not in AXES]
    if unknown:
        raise ConfigError(f"mesh: there is no axis {', '.join(unknown)}. The axes are {', '.join(AXES)}.")
    asked = {axis: sizes.get(axis, 1) for axis in AXES}
    text = " x ".join(f"{axis}={size}" for axis, size in asked.items())
    wrong = [axis for axis, size in asked.items() if size < 1 and size != REST]
    if wrong or list(asked.values()).count(REST) > 1:
        raise ConfigError(f"mesh {text}: sizes are at least 1, and one may be {REST}, which means the rest.")
    named = math.prod(size for size in asked.values() if size != REST)
    shape = tuple(len(devices) // named if size == REST else size for size in asked.values())
    if math.prod(shape) != len(devices):
        allowed = (
            f"a divisor of it: {_divisors(len(devices))}"
            if REST in asked.values()
            else f"{len(devices)}, or one size {REST}, the rest"
        )
        raise ConfigError(
            f"mesh {text}: the sizes multiply to {named}, and there are {len(devices)} devices. "
            f"Make the product {allowed}."
        )
    # Explicit axes, the default, need a sharding at every gather of the model.
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def share_cores(mesh: Mesh) -> bool:
    """Whether the devices are CPU cores that split lanes only, so that busy ones can use the time of idle ones."""
    return mesh.devices.flat[0].platform == "cpu" and mesh.shape["lane"] == mesh.size


def split_by_rules(shapes: Mapping[str, tuple[int, ...]], mesh: Mesh, rules: Sequence[Rule]) -> Tree:
    """Shardings of all parameters of a tree.

    Args:
        shapes: "/"-joined path -> shape of a parameter.
        mesh: from `make_mesh`.
        rules: the first rule that matches a parameter's path and number of dimensions applies.

    Returns:
        The tree with a `NamedSharding` for each parameter.

    Raises:
        ConfigError: a parameter has no rule, or mesh axes don't divide dimensions; all of them are named.
    """
    shardings, refused = {}, []
    dimensions: dict[str, list[int]] = {}  # mesh axes -> the sizes that they split
    for path, shape in shapes.items():
        spec = _spec(path, shape, rules)
        for i, axis in enumerate(spec):
            if axis is not None:
                axes = (axis,) if isinstance(axis, str) else axis
                name, parts = " x ".join(axes), math.prod(mesh.shape[axis] for axis in axes)
                dimensions.setdefault(name, []).append(shape[i])
                if shape[i] % parts:
                    refused.append((path, shape, i, name, parts))
        shardings[path] = NamedSharding(mesh, PartitionSpec(*spec))
    if refused:
        lines = [
            f"  {path} {list(shape)}: axis {i} has size {shape[i]}, mesh axis {name} has size {parts}"
            for path, shape, i, name, parts in refused
        ]
        good = [
            f"{name} {_divisors(math.gcd(*dimensions[name]))}"
            for name in dict.fromkeys(name for *_, name, _ in refused)
        ]
        raise ConfigError(
            "mesh: these dimensions can't be split evenly:\n"
            + "\n".join([*lines, f"Sizes that divide all: {'; '.join(good)}."])
        )
    return unflatten(shardings)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Splits the samples of a batch [B, ...] over data and fsdp; see `check_batch`."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def row_sharding(mesh: Mesh) -> NamedSharding:
    """Splits the rows of an array [B, ...] over every axis but `tensor`, for work that has no lanes."""
    return NamedSharding(mesh, PartitionSpec(("lane", *BATCH_AXES)))


def chunk_sharding(mesh: Mesh) -> NamedSharding:
    """Splits the samples of several batches [C, B, ...] over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(None, BATCH_AXES))


def place_batches(batches: Mapping[str, object], mesh: Mesh) -> Tree:
    """Puts several batches [C, B, ...], or packed ones (`data.packing.Packing.pack`), on their devices."""
    by_sample = chunk_sharding(mesh)
    if "blocks" not in batches:
        return place(batches, by_sample)
    by_row = NamedSharding(mesh, PartitionSpec(None, None, BATCH_AXES))
    shardings = {"tiles": by_sample, "blocks": NamedSharding(mesh, PartitionSpec()), "wide": by_row, "narrow": by_row}
    return {name: place(part, shardings[name]) for name, part in batches.items()}


def batch_parts(mesh: Mesh) -> int:
    """Number of devices that the samples of a batch are split over."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def lane_sharding(mesh: Mesh) -> NamedSharding:
    """Splits lanes [K, ...] over the lane axis."""
    return NamedSharding(mesh, PartitionSpec("lane"))


def check_batch(batch_size: int, mesh: Mesh) -> None:
    """Checks that the mesh splits a batch evenly.

    Raises:
        ConfigError: data x fsdp doesn't divide the batch size.
    """
    parts = batch_parts(mesh)
    if batch_size % parts:
        text = " x ".join(f"{axis}={mesh.shape[axis]}" for axis in BATCH_AXES)
        raise ConfigError(
            f"a batch of {batch_size} samples can't be split evenly over mesh {text}, {parts} parts. "
            f"Make the batch size a multiple of {parts}, or the parts one of {_divisors(batch_size)}."
        )


@overload
def place(tree: np.ndarray, shardings: NamedSharding) -> jax.Array: ...
@overload
def place(tree: Mapping[str, object], shardings: object) -> Tree: ...
@overload
def place(tree: Pytree, shardings: object) -> Pytree: ...
def place(tree: object, shardings: object) -> object:
    """Puts arrays on their devices.

    Args:
        tree: pytree of numpy or JAX arrays. Where other processes have some of the devices, each process passes the
            same whole arrays and keeps its own parts.
        shardings: the pytree of shardings, or one sharding for all leaves.

    Returns:
        The pytree of JAX arrays; arrays that have their sharding already are not copied.
    """

    def put(leaf: np.ndarray | jax.Array, sharding: NamedSharding) -> jax.Array:
        if isinstance(leaf, jax.Array) and leaf.is_fully_addressable == sharding.is_fully_addressable:
            return jax.device_put(leaf, sharding)
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    if isinstance(shardings, NamedSharding):
        return jax.tree.map(lambda leaf: put(leaf, shardings), tree)
    return jax.tree.map(put, tree, shardings)


def _spec(path: str, shape: tuple[int, ...], rules: Sequence[Rule]) -> tuple[Axis, ...]:
    for pattern, trailing in rules:
        if re.fullmatch(pattern, path):
            spec = (None, *trailing) if _LAYERS in path else trailing
            if len(spec) == len(shape):
                return spec
    raise ConfigError(
        f"mesh: no rule matches the parameter {path} of shape {list(shape)}. Add one to the model family's shardings."
    )


def _divisors(number: int) -> str:
    return ", ".join(str(size) for size in range(1, number + 1) if number % size == 0)
