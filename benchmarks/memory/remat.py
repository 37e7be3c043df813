"""Remat policies: memory of a lane-step at LLaVA-OneVision-0.5B's shapes, and time and FLOPs on the demo's model.

    python -m benchmarks.memory.remat

Memory is what the compiler plans for temporary buffers (nothing is allocated); it decides the policy that
`model.remat: auto` turns to when a step without remat would not fit. The figure is the share of the temporary memory
that the `attention` policy needs.
"""

import dataclasses
import math
import statistics
import sys
import time
from functools import partial

import jax
import numpy as np

from benchmarks.lib.results import require_quiet, write_result
from benchmarks.speed import xla_flops
from mars_jax.adapters import lora
from mars_jax.lanes.step import mean_loss
from mars_jax.models.families.registry import build_model
from mars_jax.models.memory import activation_bytes

POLICIES = ("none", "attention", "full")
REPEATS = 30


def gradient(case: xla_flops.Case, remat: str) -> jax.stages.Compiled:
    """Compiles loss and gradients of a case under a policy."""
    loss = partial(mean_loss, build_model(case.config, remat))
    adapters = jax.eval_shape(lambda: lora.init_adapters(jax.random.key(0), case.targets, case.ranks))
    return jax.jit(jax.grad(loss, argnums=1)).lower(case.base, adapters, case.batch).compile()


def milliseconds(case: xla_flops.Case, remat: str) -> list[float]:
    """Times of one step of a case, on random numbers."""
    rng = np.random.default_rng(0)

    def fill(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        if np.issubdtype(leaf.dtype, np.integer):
            return np.zeros(leaf.shape, leaf.dtype)
        return rng.normal(0.0, 0.02, leaf.shape).astype(leaf.dtype)

    compiled = gradient(case, remat)
    adapters = jax.eval_shape(lambda: lora.init_adapters(jax.random.key(0), case.targets, case.ranks))
    arguments = jax.device_put(jax.tree.map(fill, (case.base, adapters, case.batch)))
    jax.block_until_ready(compiled(*arguments))
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        times.append(1000 * (time.perf_counter() - start))
    return times


def main() -> None:
    """Runs and writes results/remat.json."""
    require_quiet("--anyway" in sys.argv)
    large, demo = dataclasses.replace(xla_flops.large(), batch_size=4), xla_flops.demo()
    rows = {}
    for remat in POLICIES:
        plan = gradient(large, remat).memory_analysis()
        planned = plan.temp_size_in_bytes if plan else math.nan
        times = milliseconds(demo, remat)
        estimate = activation_bytes(
            large.config, large.ranks, batch_size=4, tokens=large.tokens, tiles=large.tiles, remat=remat
        )
        rows[remat] = {
            "temporary_gib_05b_batch4_float32": planned / 2**30,
            "estimated_gib": estimate / 2**30,
            "demo_ms_median": statistics.median(times),
            "demo_ms_min": min(times),
        }
    figure = rows["attention"]["temporary_gib_05b_batch4_float32"] / rows["none"]["temporary_gib_05b_batch4_float32"]
    write_result("remat", figure, "share of the memory", "below 0.5", "python -m benchmarks.memory.remat", rows)


if __name__ == "__main__":
    main()
