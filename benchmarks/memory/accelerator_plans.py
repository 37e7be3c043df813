"""Largest share of a GPU's or TPU's memory that the probe program of a real model needs.

XLA compiles for devices that aren't there, so one can know that a model fits before one has the device. The probe
program is compiled from shapes alone, at the size of LLaVA-OneVision 0.5B, for H100 GPUs and v5e TPUs, split over
several by lanes (`lane`), samples (`data`), parameters (`fsdp`) or within each product (`tensor`). The compiler's plan
has the memory of a device and the operations by which devices exchange data. Nothing is run or timed.

    python -m benchmarks.memory.accelerator_plans [--short] [--out FOLDER]

`--short` takes two layers of each part. Needed is `pip install "jax[cuda12]" libtpu`, for the compilers.

Definitions. Memory is that of arguments and temporary buffers. Four lanes on each device of the `lane` axis, adapters
of rank 16, a batch of four samples with two tiles of 384 pixels and 1,507 tokens each, in bfloat16; layers are
rematerialised by the policy `attention` unless a row says otherwise. GPUs are compiled for without autotuning. Each row
is a fresh process, and the result is written after each.

figure = largest share of a device's memory.
"""

import dataclasses
import re
import sys
import time
from functools import cache
from typing import Any, cast

from benchmarks.lib.child import Document, answer, arguments, publish, run_child
from mars_jax.runtime.jsonfiles import dump_json

LANES, CHUNK, EVAL_BATCHES = 4, 8, 2
BATCH_SIZE, TOKENS, TILES = 4, 1507, 2
# Memory in GiB, as sold.
MEMORY = {"h100": 80, "v5e": 16}
ROWS: tuple[Document, ...] = (
    {"target": "h100", "devices": 1, "axis": "lane", "remat": "none"},
    {"target": "h100", "devices": 1, "axis": "lane"},
    {"target": "h100", "devices": 2, "axis": "lane"},
    {"target": "h100", "devices": 2, "axis": "data"},
    {"target": "h100", "devices": 2, "axis": "fsdp"},
    {"target": "h100", "devices": 2, "axis": "tensor"},
    {"target": "v5e", "devices": 4, "axis": "lane"},
)
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")
# What XLA wants to know of a GPU that isn't there, from its own description of the kind.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84929347584
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 7 }
runtime_version { major: 12 minor: 8 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
WITHOUT_DEVICES = {
    "CUDA_VISIBLE_DEVICES": "-1",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def main() -> None:
    """Writes results/accelerator_plans.json; about a quarter of an hour, more than half of it for the TPU."""
    options = arguments(__doc__)
    if options.child:
        return answer(options.child, compiled)
    rows = []
    for row in ROWS:
        flags = {"XLA_FLAGS": "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"}
        environment = WITHOUT_DEVICES | (flags if row["target"] == "h100" else {})
        rows.append(run_child(__file__, {"remat": "attention", **row, "short": options.short}, **environment))
        print(dump_json(rows[-1]), file=sys.stderr, flush=True)
        publish(
            options,
            "accelerator_plans",
            max(row["share of memory"] for row in rows),
            "largest share of a device's memory that a probe program needs, by its compiler",
            "at most 0.92",
            {"tables": {"": rows}},
        )


def compiled(target: str, devices: int, axis: str, remat: str, short: bool) -> Document:
    """A row of the table."""
    import jax
    import jax.numpy as jnp
    import optax
    from jax.experimental import topologies
    from jax.sharding import NamedSharding, PartitionSpec

    from benchmarks.speed.xla_flops import large
    from mars_jax.adapters.lora import LORA
    from mars_jax.lanes.engine import EngineShape, Training, make_engine
    from mars_jax.lanes.state import Work
    from mars_jax.models.families.registry import build_model
    from mars_jax.models.shardings import base_shardings
    from mars_jax.runtime.sharding import chunk_sharding, make_mesh

    if target == "h100":
        as_if_on_an_h100()
        topology = topologies.get_topology_desc(
            platform="cuda", topology_name="h100", target_config=H100, topology=f"1x1x{devices}"
        )
    else:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=f"{target}:2x2")
    mesh = make_mesh({axis: devices}, topology.devices)

    def shaped(leaf: Any, sharding: NamedSharding, dtype: Any = None, leading: tuple[int, ...] = ()) -> Any:
        return jax.ShapeDtypeStruct((*leading, *leaf.shape), dtype or leaf.dtype, sharding=sharding)

    case = dataclasses.replace(large(), batch_size=BATCH_SIZE, tokens=TOKENS, tiles=TILES)
    if short:
        case = case.with_depth(2, 2)
    lane_devices = mesh.shape["lane"]
    slots = LANES * lane_devices
    transform = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam())
    training = Training(build_model(case.config, remat), case.targets, LORA, transform, num_snapshots=4)
    engine = make_engine(training, EngineShape(case.ranks, slots, lane_block=1), mesh)
    of_lanes, everywhere = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("lane",), ()))
    integers = jax.ShapeDtypeStruct((slots,), jnp.int32)
    rates = jax.ShapeDtypeStruct((slots,), jnp.float32)
    of_modules = (dict.fromkeys(case.ranks, array) for array in (integers, rates))
    state = jax.eval_shape(engine.init, case.base, integers, *of_modules)
    batches, validation = (
        {name: shaped(leaf, chunk_sharding(mesh), leading=(count,)) for name, leaf in case.batch.items()}
        for count in (CHUNK, EVAL_BATCHES)
    )
    whole, of_step, flag = (
        jax.ShapeDtypeStruct(shape, dtype, sharding=everywhere)
        for shape, dtype in (((), jnp.int32), ((CHUNK,), jnp.float32), ((), jnp.bool_))
    )
    work = Work(
        slots=shaped(integers, of_lanes),
        num_blocks=jax.ShapeDtypeStruct((lane_devices,), jnp.int32, sharding=of_lanes),
        batches=batches,
        multipliers=of_step,
        newest_share=of_step,
        num_steps=whole,
        evaluate=flag,
        step=whole,
        half=flag,
        eval_batches=whole,
    )
    base = jax.tree.map(
        lambda leaf, sharding: shaped(leaf, sharding, jnp.bfloat16), case.base, base_shardings(case.config, mesh)
    )
    state = jax.tree.map(lambda leaf: shaped(leaf, of_lanes), state)
    start = time.perf_counter()
    program = cast("jax.stages.Wrapped", engine.chunk).lower(state, base, validation, work).compile()
    seconds = time.perf_counter() - start
    plan, text = program.memory_analysis(), program.as_text() or ""
    assert plan is not None
    gibibytes = {
        "arguments, GiB": plan.argument_size_in_bytes / 2**30,
        "temporary, GiB": plan.temp_size_in_bytes / 2**30,
    }
    return {
        "target": target,
        "devices": devices,
        "axis": axis,
        "remat": remat,
        **gibibytes,
        "share of memory": sum(gibibytes.values()) / MEMORY[target],
        **{name: len(re.findall(rf" {name}(?:-start)?\(", text)) for name in COLLECTIVES},
        "calls of cuDNN's attention": text.count("__cudnn$fmha") if target == "h100" else None,
        "seconds to compile here": seconds,
    }


def as_if_on_an_h100() -> None:
    """Has JAX and our models believe that such a device and its cuDNN are here, which they check while tracing."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    from mars_jax.models import attention

    cudnn.check_cudnn_version = lambda: 91000
    cudnn.check_compute_capability = lambda least: True
    cudnn.is_cuda_compute_capability_equal = lambda other: False
    attention._cuda_capability = cache(lambda: 9.0)


if __name__ == "__main__":
    main()
