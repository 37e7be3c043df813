"""Programs that XLA compiles for the whole probe phase of the demo.

Compiling a program can take longer than training a probe with it, so lanes of all ranks, rates and data sizes should
share programs. In a fresh process with an empty compile cache every program that JAX asks XLA for is counted, the small
ones of single operations too. A second process with the same cache should find all of them on disk.

    python -m benchmarks.speed.compiles [--short] [--anyway] [--out FOLDER]

Definitions. The probe phase is that of `mars probe configs/demo.yaml` with a run of its own for each of two data sizes;
the second process has a new run directory. The number of lanes in a bucket is data of its program, so a bucket needs
one program: the goal is the number of buckets + 3.

figure = programs compiled by the first process.
"""

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.lib.child import DEMO, SEPARATE, Document, Warnings, answer, arguments, demo_config, publish, run_child
from benchmarks.lib.results import require_quiet

LANE_COUNT_SIZES = 1
SHORT = (*SEPARATE, "lora.modules.vision.ranks=[2,8]", "lora.modules.llm.ranks=[2,8]", "probe.steps=16")


def main() -> None:
    """Writes results/compiles.json; about five minutes."""
    options = arguments(__doc__)
    if options.child:
        return answer(options.child, count)
    load = require_quiet(options.anyway)
    with TemporaryDirectory() as folder:
        first, second = two_processes(Path(folder), SHORT if options.short else SEPARATE)
    limit = bound(first["buckets"])
    publish(
        options,
        "compiles",
        first["compiles"],
        "programs compiled by the probe phase of the demo",
        f"at most {limit}",
        {
            "foreign_cores_busy": load,
            "bound": {"buckets": first["buckets"], "lane_count_sizes": LANE_COUNT_SIZES, "compiles": limit},
            "first_process": first,
            "second_process": second,
            "tables": {
                "": [
                    {
                        "process": name,
                        "programs asked for": sum(found["programs"].values()),
                        "compiled": found["compiles"],
                        "read from the cache": found["hits"],
                        "missed": found["misses"],
                        "seconds compiling or reading": found["compile_seconds"],
                        "seconds in all": found["seconds"],
                    }
                    for name, found in (("first", first), ("second", second))
                ],
                "Programs compiled by the first process": [
                    {"program": name, "times": times} for name, times in first["programs"].items()
                ],
            },
        },
    )


def bound(buckets: int) -> int:
    """Most compiles that a probe phase may need."""
    return buckets * LANE_COUNT_SIZES + 3


def two_processes(
    folder: Path, overrides: Sequence[str], config: Path = DEMO, **environment: str
) -> tuple[Document, Document]:
    """Counts in two fresh processes that share a cache, each with its own run directory: `folder`/first and /second."""
    spec = {"config": config, "overrides": list(overrides), "cache": folder / "cache"}
    first, second = (
        run_child(__file__, {**spec, "run_dir": folder / name}, **environment) for name in ("first", "second")
    )
    return first, second


def count(config: str, overrides: list[str], cache: str, run_dir: str) -> Document:
    """Runs the probe phase in this process, which must be fresh, and counts what it compiles."""
    from mars_jax.job.job import make_job
    from mars_jax.job.programs import probe_programs
    from mars_jax.pipeline import run_pipeline
    from mars_jax.runtime import compile_cache
    from mars_jax.search.probes.design import planned_lanes

    compile_cache.enable(Path(cache))
    settings = demo_config(run_dir, overrides, config)
    start = time.perf_counter()
    with compile_cache.CompileCounter() as counter:
        lanes = run_pipeline("probe", settings, Warnings())
    seconds = time.perf_counter() - start
    # Which buckets there are doesn't depend on the block.
    buckets = probe_programs(make_job(settings, Warnings()), planned_lanes(settings), lane_block=1)
    return {
        "lanes": lanes,
        "buckets": len(buckets),
        "compiles": counter.compiles,
        "hits": counter.hits,
        "misses": counter.misses,
        "programs": dict(Counter(counter.programs).most_common()),
        "compile_seconds": counter.seconds,
        "seconds": seconds,
    }


if __name__ == "__main__":
    main()
