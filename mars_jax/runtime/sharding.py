"""How arrays are split over devices: the mesh, a rule for every parameter of a base, batches and lanes.

Sharding is automatic: these are shardings of arguments for `jax.jit`, and XLA adds the communication. Nothing here is
part of a model, and nothing assumes that one process reaches all devices.

    mesh = make_mesh({"fsdp": -1, "tensor": 2})
    base = place(base, base_shardings(jax.eval_shape(lambda: base), mesh))
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mars_jax.errors import ConfigError
from mars_jax.runtime.trees import flatten, unflatten

AXES = ("lane", "data", "fsdp", "tensor")
REST = -1

# What splits samples, and what splits the heads of attention, as products of queries, keys and values are.
BATCH_AXES, HEAD_AXIS = ("data", "fsdp"), "tensor"

# Mesh axes of the trailing dimensions of each parameter, which is what a rule names; a leading axis of layers is left
# whole. A column-parallel linear splits its output over `tensor`, a row-parallel one its input, so that a pair of them
# communicates once (Shoeybi et al., arXiv 1909.08053); `fsdp` splits the other side. The embedding's rows are looked
# up, so both axes split its columns. (With rows over `tensor` and columns over `fsdp`, the XLA of jaxlib 0.10.1 ends
# the process where the mesh has a lane axis too: a failed check in spmd_partitioner_util.cc.)
_COLUMN = r".*/(q_proj|k_proj|v_proj|gate_proj|up_proj|fc1|linear_1)"
_ROW = r".*/(o_proj|out_proj|proj|down_proj|fc2|linear_2)"
_NORM = r"(pre|input|post_attention)_layernorm|layer_norm[12]|layer_scale[12]|norm[12]?"
_Axis = str | tuple[str, ...] | None
_RULES: tuple[tuple[str, tuple[_Axis, ...]], ...] = (
    (rf"{_COLUMN}/kernel", ("fsdp", "tensor")),
    (rf"{_COLUMN}/bias", ("tensor",)),
    (rf"{_ROW}/kernel", ("tensor", "fsdp")),
    (rf"{_ROW}/bias", (None,)),
    # Split over `tensor`, a fused linear would be cut across queries, keys and values.
    (r".*/qkv/kernel", ("fsdp", None)),
    (r".*/qkv/bias", (None,)),
    (r"llm/embed_tokens/embedding", (None, ("fsdp", "tensor"))),
    (r"llm/lm_head/kernel", ("fsdp", "tensor")),
    (r"vision/(patch_embed/kernel|position_embed)", (None, None)),
    (r"vision/patch_embed/bias|vision/class_embed|image_newline", (None,)),
    (rf".*/({_NORM})/(scale|bias)", (None,)),
)
_LAYERS = "/layers/"


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of all devices, with the axes `AXES`.

    Args:
        sizes: axis -> devices along it; 1 for those not named. One may be `REST`, whatever remains.
        devices: the devices to use, all of them; None for those of all processes.

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
    """Whether the devices are cores of this machine that split nothing but lanes: an idle one leaves room to others."""
    return mesh.devices.flat[0].platform == "cpu" and mesh.shape["lane"] == mesh.size


def base_shardings(abstract_base: Mapping[str, Any], mesh: Mesh) -> dict[str, Any]:
    """The sharding of every parameter of a base.

    Args:
        abstract_base: the parameter tree; arrays or `ShapeDtypeStruct`s.
        mesh: of `make_mesh`.

    Returns:
        The tree with a `NamedSharding` for each leaf.

    Raises:
        ConfigError: a parameter without a rule, or dimensions that their mesh axis doesn't divide, all named.
    """
    shardings, refused = {}, []
    dimensions: dict[str, list[int]] = {}  # mesh axes -> the sizes that they split
    for path, leaf in flatten(abstract_base).items():
        spec = _spec(path, leaf.shape)
        for i, axis in enumerate(spec):
            if axis is not None:
                axes = (axis,) if isinstance(axis, str) else axis
                name, parts = " x ".join(axes), math.prod(mesh.shape[axis] for axis in axes)
                dimensions.setdefault(name, []).append(leaf.shape[i])
                if leaf.shape[i] % parts:
                    refused.append((path, leaf.shape, i, name, parts))
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


def place_batches(batches: Mapping[str, Any], mesh: Mesh) -> Any:
    """Puts several batches [C, B, ...] on their devices, or several packed ones: see `data.packing.Packing.pack`."""
    by_sample = chunk_sharding(mesh)
    if "blocks" not in batches:
        return place(batches, by_sample)
    by_row = NamedSharding(mesh, PartitionSpec(None, None, BATCH_AXES))
    shardings = {"tiles": by_sample, "blocks": NamedSharding(mesh, PartitionSpec()), "wide": by_row, "narrow": by_row}
    return {name: place(part, shardings[name]) for name, part in batches.items()}


def batch_parts(mesh: Mesh) -> int:
    """Devices that the samples of a batch are split over."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def lane_sharding(mesh: Mesh) -> NamedSharding:
    """Splits lanes [N, ...]."""
    return NamedSharding(mesh, PartitionSpec("lane"))


def check_batch(batch_size: int, mesh: Mesh) -> None:
    """Refuses a batch that the mesh can't split evenly.

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


def place(tree: Any, shardings: Any) -> Any:
    """Puts arrays on their devices.

    Args:
        tree: arrays, of numpy or jax. Where other processes hold some of the devices, each process gives the same
            whole arrays and keeps its own parts.
        shardings: the tree of shardings, or one for all leaves.

    Returns:
        The tree of jax arrays; those already in place are not copied.
    """

    def put(leaf: Any, sharding: NamedSharding) -> jax.Array:
        if isinstance(leaf, jax.Array) and leaf.is_fully_addressable == sharding.is_fully_addressable:
            return jax.device_put(leaf, sharding)
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    if isinstance(shardings, NamedSharding):
        return jax.tree.map(lambda leaf: put(leaf, shardings), tree)
    return jax.tree.map(put, tree, shardings)


def _spec(path: str, shape: tuple[int, ...]) -> tuple[_Axis, ...]:
    for pattern, trailing in _RULES:
        if re.fullmatch(pattern, path):
            spec = (None, *trailing) if _LAYERS in path else trailing
            if len(spec) == len(shape):
                return spec
    raise ConfigError(
        f"mesh: no rule says how to split the parameter {path} of shape {list(shape)}. Add one to {__name__}."
    )


def _divisors(number: int) -> str:
    return ", ".join(str(size) for size in range(1, number + 1) if number % size == 0)
