"""Which of this machine's devices a run uses, and the memory that they have. How arrays are split is `sharding`."""

import math
import os
from collections.abc import Mapping

import jax
from jax.sharding import Mesh

from mars_jax.runtime.sharding import REST, make_mesh, share_cores

# Of the machine's memory, what copies of the base may take, of which every core that runs lanes has one.
_COPIES_SHARE = 0.25


def devices_to_use(sizes: Mapping[str, int], base_bytes: int, lanes: int) -> list[jax.Device]:
    """All devices, but of a CPU's cores as many as the mesh asks for.

    Where it leaves that open, as many as lanes, and as copies of the base, are to be in memory.

    Args:
        sizes: axis of the mesh -> devices along it, or `REST`.
        base_bytes: of one copy of the base.
        lanes: most lanes in memory at once.
    """
    devices = jax.devices()
    if jax.default_backend() != "cpu" or jax.process_count() > 1:
        return devices
    if REST not in sizes.values():
        return devices[: math.prod(sizes.values())]
    if sizes["lane"] != REST or any(size != 1 for axis, size in sizes.items() if axis != "lane"):
        return devices
    copies = int(_COPIES_SHARE * physical_memory_bytes() / base_bytes)
    return devices[: max(1, min(copies, lanes))]


def single_lane_mesh(mesh: Mesh, batch_size: int) -> Mesh:
    """The devices of a mesh for one lane: its samples are split over those that lanes were, where they divide.

    Cores need no splitting: they share the products of a lane.
    """
    sizes = dict(mesh.shape)
    if share_cores(mesh):
        return make_mesh({}, list(mesh.devices.flat[:1]))
    if sizes["lane"] == 1 or batch_size % (sizes["lane"] * sizes["data"] * sizes["fsdp"]):
        return mesh
    return make_mesh({**sizes, "lane": 1, "data": sizes["lane"] * sizes["data"]}, list(mesh.devices.flat))


def device_memory_bytes(mesh: Mesh) -> int:
    """Memory of one device of a mesh: an accelerator's own, or its part of this machine's."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("bytes_limit", physical_memory_bytes() // mesh.local_mesh.size)


def physical_memory_bytes() -> int:
    """Memory of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
