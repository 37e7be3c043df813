"""Environment variables to set before JAX is imported. Imports nothing heavy and sets nothing itself."""

import os


def cpu_device_for_each_core() -> dict[str, str]:
    """Variables that make every CPU core a JAX device, so that lanes run side by side, one on each core.

    Two cores with a lane each are used better than two that share the matrix products of one lane. Accelerators are
    not affected.

    Returns:
        Variable -> value; empty where the user has set a number of CPU devices.
    """
    set_for_jax = "JAX_NUM_CPU_DEVICES" in os.environ
    set_for_xla = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if set_for_jax or set_for_xla:
        return {}
    # Where the system reports it, only the cores that this process may use.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"JAX_NUM_CPU_DEVICES": str(cores or 1)}
