"""Temporary memory of a training step with rematerialised attention, over that of a step that keeps everything.

Rematerialisation computes activations again in the backward pass in place of keeping them. For each policy (`none`,
`attention`, `full`) the memory is what the compiler plans for temporary buffers at LLaVA-OneVision 0.5B's shapes, where
nothing is allocated, and the time is that of a step of the demo's model, which is run. The memory decides which policy
`model.remat: auto` turns to when a step without it would not fit, and is compared with `mars plan`'s estimate.

    python -m benchmarks.memory.remat [--short] [--anyway] [--out FOLDER]

`--short` takes two layers of each part.

figure = temporary memory with the policy `attention` / without rematerialisation.
"""

import dataclasses
import math
import statistics
import time
from functools import partial

import jax
import numpy as np

from benchmarks.lib.child import arguments, publish
from benchmarks.lib.results import require_quiet
from benchmarks.speed import xla_flops
from mars_jax.adapters.tree import init_adapters
from mars_jax.lanes.step import mean_loss
from mars_jax.models.families.registry import build_model
from mars_jax.models.memory import activation_bytes

POLICIES = ("none", "attention", "full")
REPEATS, SHORT_REPEATS = 30, 3


def gradient(case: xla_flops.Case, remat: str) -> jax.stages.Compiled:
    """Compiles loss and gradients of a case under a policy."""
    loss = partial(mean_loss, build_model(case.config, remat))
    adapters = jax.eval_shape(lambda: init_adapters(jax.random.key(0), case.targets, case.ranks))
    return jax.jit(jax.grad(loss, argnums=1)).lower(case.base, adapters, case.batch).compile()


def milliseconds(case: xla_flops.Case, remat: str, repeats: int) -> list[float]:
    """Times of one step of a case, on random numbers."""
    rng = np.random.default_rng(0)

    def fill(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        if np.issubdtype(leaf.dtype, np.integer):
            return np.zeros(leaf.shape, leaf.dtype)
        return rng.normal(0.0, 0.02, leaf.shape).astype(leaf.dtype)

    compiled = gradient(case, remat)
    adapters = jax.eval_shape(lambda: init_adapters(jax.random.key(0), case.targets, case.ranks))
    arguments = jax.device_put(jax.tree.map(fill, (case.base, adapters, case.batch)))
    jax.block_until_ready(compiled(*arguments))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        times.append(1000 * (time.perf_counter() - start))
    return times


def main() -> None:
    """Writes results/remat.json; a few minutes, most of it compiling."""
    options = arguments(__doc__)
    load = require_quiet(options.anyway)
    large, demo = dataclasses.replace(xla_flops.large(), batch_size=4), xla_flops.demo()
    if options.short:
        large = large.with_depth(2, 2)
    rows, memory = [], {}
    for remat in POLICIES:
        plan = gradient(large, remat).memory_analysis()
        memory[remat] = (plan.temp_size_in_bytes if plan else math.nan) / 2**30
        times = milliseconds(demo, remat, SHORT_REPEATS if options.short else REPEATS)
        estimate = activation_bytes(
            large.config, large.ranks, batch_size=4, tokens=large.tokens, tiles=large.tiles, remat=remat
        )
        rows.append(
            {
                "policy": remat,
                "temporary memory, GiB": memory[remat],
                "estimate of `mars plan`, GiB": estimate / 2**30,
                "ms of a step of the demo, median": statistics.median(times),
                "minimum": min(times),
            }
        )
    publish(
        options,
        "remat",
        memory["attention"] / memory["none"],
        "temporary memory with the policy `attention` / without rematerialisation",
        "below 0.5",
        {"foreign_cores_busy": load, "tables": {"": rows}},
    )


if __name__ == "__main__":
    main()
