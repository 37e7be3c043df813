"""Peak memory of several lanes in one process, over that of as many PEFT processes.

The usual way to train several adapters at once is a process for each, every one with its own copy of base and
libraries. Ours holds them once. Fresh processes train the demo at its largest ranks: ours with an empty compile cache
(the figure, so XLA's own memory counts) and with the programs on disk; PEFT's all at the same time, with memory that
they share counted in full or in proportion (Pss). What a lane more takes is compared with the estimate of `mars plan`.

    python -m benchmarks.memory.lanes_beside_processes [--short] [--anyway] [--out FOLDER]

Definitions. Batches are of 16 samples. Ours runs two calls of the compiled chunk and an eval point over K lanes, one a
core at a time. A PEFT process imports transformers, PEFT and torch (no JAX), trains four steps with logits at all
positions and waits until all have; then the kernel is asked for each one's peak resident set (VmHWM), and for its
proportional share of what they have in common (Pss).

figure = peak of 8 lanes, compiling included / sum of the peaks of 8 PEFT processes.
"""

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.lib.child import (
    ROOT,
    SEPARATE,
    Document,
    Warnings,
    answer,
    arguments,
    demo_config,
    publish,
    quiet_environment,
    run_child,
)
from benchmarks.lib.results import require_quiet

RANKS = {"vision": 32, "projector": 8, "llm": 32}
LANES = (4, 8, 32)  # 32 for the slope
PROCESSES = (1, 4, 8)
MIB = 2**20


def main() -> None:
    """Writes results/lanes_beside_processes.json; about four minutes."""
    options = arguments(__doc__)
    if options.child:
        return answer(options.child, train_lanes)
    load = require_quiet(options.anyway)
    lanes, processes = ((2,), (1, 2)) if options.short else (LANES, PROCESSES)
    with TemporaryDirectory() as folder:
        cache = Path(folder) / "cache"
        spec = {"cache": cache, "run_dir": Path(folder) / "run"}
        ours = {
            count: {cached: run_child(__file__, {**spec, "lanes": count}) for cached in ("compiling", "from disk")}
            for count in lanes
        }
        job = prepare_peft(Path(folder) / "peft")
        theirs = {count: peft_processes(job, count) for count in processes}
    few, most = min(lanes), max(lanes)
    slope = None
    if few < most:
        slope = (ours[most]["from disk"]["peak_bytes"] - ours[few]["from disk"]["peak_bytes"]) / (most - few)
    both = max(set(lanes) & set(processes))
    one = theirs[1]["peak_bytes"]
    publish(
        options,
        "lanes_beside_processes",
        ours[both]["compiling"]["peak_bytes"] / theirs[both]["peak_bytes"],
        f"peak memory of {both} lanes / of {both} PEFT processes",
        "below 1",
        {
            "foreign_cores_busy": load,
            "ranks": RANKS,
            "ours": ours,
            "peft": theirs,
            "bytes_a_lane": {"measured": slope, "planned": ours[few]["from disk"]["planned_lane_bytes"]},
            "tables": {
                "Peak memory, MiB": [
                    {
                        "lanes": count,
                        "ours, compiling": ours[count]["compiling"]["peak_bytes"] / MIB if count in ours else None,
                        "ours, programs from disk": ours[count]["from disk"]["peak_bytes"] / MIB
                        if count in ours
                        else None,
                        "PEFT processes, sum of peaks": theirs[count]["peak_bytes"] / MIB if count in theirs else None,
                        "PEFT processes, sum of shares (Pss)": theirs[count]["shared_bytes"] / MIB
                        if count in theirs
                        else None,
                        "one PEFT process": one / MIB,
                    }
                    for count in sorted({*lanes, *processes})
                ],
                "A lane more, MiB": [
                    {
                        "lanes": f"{few} to {most}",
                        "measured": slope / MIB if slope is not None else None,
                        "planned": ours[few]["from disk"]["planned_lane_bytes"] / MIB,
                    }
                ],
            },
        },
    )


# Ours, in the child.


def train_lanes(lanes: int, cache: str, run_dir: str) -> Document:
    """Trains lanes for two calls of the chunk and an eval point; this process's peak."""
    from mars_jax.job.job import make_job
    from mars_jax.lanes.engine import EngineShape
    from mars_jax.lanes.lane import Lane
    from mars_jax.lanes.loop import run_group
    from mars_jax.lanes.schedule import Schedule, warmup_multipliers
    from mars_jax.runtime import compile_cache
    from mars_jax.search.cost import lane_costs
    from mars_jax.search.probes.design import planned_lanes

    compile_cache.enable(Path(cache))
    job = make_job(demo_config(run_dir, SEPARATE), Warnings())
    settings = job.config.probe
    group = [Lane(RANKS, max(settings.num_samples), seed) for seed in range(lanes)]
    engine = job.engines.engine(EngineShape(RANKS, lanes, job.engines.default_lane_block))
    steps = 2 * settings.chunk_steps
    schedule = Schedule(warmup_multipliers(steps, 1, "constant"), [0, steps], 0, settings.chunk_steps)
    run_group(group, engine, job.inputs.probes(group[0], engine), schedule)
    peak = kernel_bytes(os.getpid(), "status", "VmHWM")
    plan = lane_costs(job, planned_lanes(job.config))
    return {"peak_bytes": peak, "planned_lane_bytes": plan["lane_bytes"]}


# PEFT.


_WRITE = "from pathlib import Path; from benchmarks.memory.lanes_beside_processes import write_peft_job as write; write"


def prepare_peft(folder: Path) -> Path:
    """Writes what PEFT processes read, in a process of its own: the drawn adapter, and a batch as tensors."""
    command = [sys.executable, "-c", f"{_WRITE}(Path({str(folder)!r}))"]
    subprocess.run(command, check=True, env=quiet_environment(), cwd=ROOT, stdout=sys.stderr)
    return folder


def write_peft_job(folder: Path) -> None:
    """See `prepare_peft`."""
    import torch

    from benchmarks.speed.peft_side import PeftGrid
    from mars_jax.data.images import load_rgb
    from mars_jax.job.job import make_job
    from mars_jax.lanes.lane import Lane

    job = make_job(demo_config(folder, SEPARATE), Warnings())
    config, base = job.config, job.base
    width, height = load_rgb(job.data.search.train[0].images[0]).size
    grid = PeftGrid(config.model.checkpoint, base.targets, base.alpha, config.optimizer, (height, width))
    lane = Lane(RANKS, max(config.probe.num_samples), seed=0)
    batch = grid.encode(job.data.probe_stream(lane, cached_encoder=False)[0])
    folder.mkdir()
    with grid.drawn(RANKS, seed=0) as drawn:
        Path(drawn).rename(folder / "adapter")
        Path(drawn).mkdir()  # `drawn` deletes it
    torch.save({**batch.inputs, "labels": batch.labels}, folder / "batch.pt")
    (folder / "base.txt").write_text(str(config.model.checkpoint))


def peft_processes(job: Path, count: int) -> Document:
    """Peaks of processes that train at the same time, and their shares while all are there."""
    with training(job, count) as pids:
        peaks = [kernel_bytes(pid, "status", "VmHWM") for pid in pids]
        shares = [kernel_bytes(pid, "smaps_rollup", "Pss") for pid in pids]
    return {"peak_bytes": sum(peaks), "shared_bytes": sum(shares), "peaks": peaks, "shares": shares}


@contextmanager
def training(job: Path, count: int) -> Iterator[Sequence[int]]:
    """Process ids of PEFT processes that have trained and still hold everything."""
    command = [sys.executable, str(ROOT / "benchmarks" / "memory" / "peft_process.py"), str(job)]
    processes = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=quiet_environment())
        for _ in range(count)
    ]
    try:
        for process in processes:
            if process.stdout is None or "trained" not in process.stdout.readline():
                raise RuntimeError(f"{shlex.join(command)} ended with {process.wait()}")
        yield [process.pid for process in processes]
    finally:
        for process in processes:
            process.communicate()


def kernel_bytes(pid: int, file: str, field: str) -> int:
    """A field in KiB of /proc/PID/FILE, in bytes."""
    lines = Path(f"/proc/{pid}/{file}").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


if __name__ == "__main__":
    main()
