"""What the environment must say before JAX is imported. It imports nothing of weight and changes nothing by itself."""

import os


def cpu_device_for_each_core() -> dict[str, str]:
    """Variables that make JAX see every core as a device, so that lanes run side by side, one a core.

    A core that works on a lane of its own is busier than two that share the products of one. Empty where the user has
    chosen a number of CPU devices. Accelerators are not concerned.
    """
    chosen = "JAX_NUM_CPU_DEVICES" in os.environ
    forced = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if chosen or forced:
        return {}
    # Where the system can tell, the cores that this process may use.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"JAX_NUM_CPU_DEVICES": str(cores or 1)}
