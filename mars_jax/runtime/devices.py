"""The devices that a run uses, and their memory. How arrays are split over them is in `sharding`."""

import math
import os
from collections.abc import Mapping

import jax
from jax.sharding import Mesh

from mars_jax.runtime.sharding import REST, make_mesh, share_cores

# Share of the machine's memory that copies of the base may take; every core that runs lanes has a copy.
_COPIES_SHARE = 0.25


def devices_to_use(sizes: Mapping[str, int], base_bytes: int, lanes: int) -> list[jax.Device]:
    """Devices for the mesh: all accelerators, or as many CPU cores as it needs.

    Where the mesh leaves the number of cores open, there are at most as many as lanes, and as copies of the base that
    fit a quarter of the memory.

    Args:
        sizes: axis of the mesh -> devices along it, or `REST`.
        base_bytes: bytes of one copy of the base.
        lanes: most lanes in memory at once.

    Returns:
        The devices, at least one.
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
    """A mesh of the same devices for one lane, its samples split over the lane axis too where they divide evenly.

    On CPU it is one device: XLA spreads the matrix products of one lane over all cores.
    """
    sizes = dict(mesh.shape)
    if share_cores(mesh):
        return make_mesh({}, list(mesh.devices.flat[:1]))
    if sizes["lane"] == 1 or batch_size % (sizes["lane"] * sizes["data"] * sizes["fsdp"]):
        return mesh
    return make_mesh({**sizes, "lane": 1, "data": sizes["lane"] * sizes["data"]}, list(mesh.devices.flat))


def device_memory_bytes(mesh: Mesh) -> int:
    """Memory in bytes of one device of a mesh; on CPU, the machine's memory divided by the local devices."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("bytes_limit", physical_memory_bytes() // mesh.local_mesh.size)


def physical_memory_bytes() -> int:
    """Memory of this machine in bytes."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
