"""What the benchmarks against PEFT share: the demo as both sides train it, and equal conditions for both.

It measures nothing by itself. Both sides run in one process, on the same two cores, in float32.
"""

import argparse
import os
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any, Literal

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # read when XLA is loaded

import jax
import numpy as np
from jax.sharding import Mesh

from benchmarks.lib.child import DEMO, PROBED, argument_parser
from benchmarks.lib.results import MAX_FOREIGN_CORES, foreign_load, require_quiet
from benchmarks.speed.peft_side import Head, PeftGrid, TorchSettings
from mars_jax.config.load import load_config
from mars_jax.data.batches import Batch
from mars_jax.data.images import load_rgb
from mars_jax.job.job import Job, make_job
from mars_jax.lanes.engine import Engine
from mars_jax.lanes.feed import Call
from mars_jax.lanes.lane import Lane
from mars_jax.lanes.loop import chunk_work, lane_slots
from mars_jax.lanes.schedule import Schedule
from mars_jax.lanes.state import LaneState
from mars_jax.runtime.progress import ConsoleReporter
from mars_jax.runtime.sharding import place_batches
from mars_jax.runtime.trees import Tree

THREADS = 2
PROJECTOR_RANK = 8
# Lanes never stop early nor are averaged, since PEFT's aren't.
AS_PEFT = ("probe.patience=null", "probe.averaging=null")
_WATCHED_SECONDS = 2.0


def arguments(document: str | None, repeats: int, short_repeats: int) -> argparse.Namespace:
    """The options of a benchmark, and the number of its rounds."""
    parser = argument_parser(document)
    parser.add_argument("--repeats", type=int, help=f"rounds (default: {repeats}, with --short {short_repeats})")
    options = parser.parse_args()
    if options.repeats is None:
        options.repeats = short_repeats if options.short else repeats
    if options.repeats < 1:
        parser.error(f"--repeats is {options.repeats}; at least 1 is needed")
    return options


class Conditions:
    """Equal conditions for both sides, for as long as a `with` block runs: `summary` has how they were.

    The process is kept to the CPU and to two cores, and programs are compiled, not read from disk. Other processes are
    watched all the time: where they take a core, torch's OpenMP threads wait for each other at every product and PEFT
    gets ten times slower, ours only twice, so such timings would flatter ours.
    """

    def __init__(self, anyway: bool) -> None:
        """To be made before JAX or torch compute anything. Ends the process on a busy machine, unless `anyway`."""
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_enable_compilation_cache", False)
        self._cores = sorted(os.sched_getaffinity(0))[:THREADS]
        os.sched_setaffinity(0, self._cores)  # what XLA takes its number of threads from
        jax.config.update("jax_num_cpu_devices", len(self._cores))  # as `mars` has it: a device for each core
        self._anyway, self._loads = anyway, [require_quiet(anyway)]
        self._over, self._stopped_seconds = threading.Event(), 0.0

    def __enter__(self) -> "Conditions":
        self._watch = threading.Thread(target=self._follow, daemon=True)
        self._watch.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._watch.join()

    def _follow(self) -> None:
        while not self._over.is_set():
            start = time.monotonic()
            self._loads.append(foreign_load(_WATCHED_SECONDS))
            late = time.monotonic() - start - _WATCHED_SECONDS
            # A thread may wait for the interpreter for a while; the whole process doesn't stand still unless stopped.
            self._stopped_seconds += late if late > _WATCHED_SECONDS else 0.0

    def summary(self) -> dict[str, Any]:
        """Threads and foreign load, for the result; ends the process if it was disturbed, unless `anyway`."""
        loads = list(self._loads)
        mean = statistics.mean(loads)
        if (mean > MAX_FOREIGN_CORES or self._stopped_seconds) and not self._anyway:
            sys.exit(
                f"Other processes kept {mean:.2f} cores busy meanwhile, and this one was stopped for "
                f"{self._stopped_seconds:.0f} s, so nothing was written. Run it again on a quiet "
                "machine, or pass --anyway."
            )
        busy = {"before": loads[0], "mean": mean, "median": statistics.median(loads), "max": max(loads)}
        return {
            "threads": len(self._cores),
            "foreign_cores_busy": busy,
            "stopped_seconds": self._stopped_seconds,
        }


def demo_job(*overrides: str) -> Job:
    """The demo with some settings changed, in which lanes train as PEFT's do."""
    return make_job(load_config(DEMO, [*PROBED, *AS_PEFT, *overrides]), ConsoleReporter())


def peft_grid(job: Job, head: Head, attention: Literal["sdpa", "eager"] = "sdpa", **where: Any) -> PeftGrid:
    """The PyTorch side of a job; `where` is the device and the dtype."""
    width, height = load_rgb(job.data.search.train[0].images[0]).size
    config = job.config
    return PeftGrid(
        config.model.checkpoint,
        job.base.targets,
        job.base.alpha,
        config.optimizer,
        (height, width),
        TorchSettings(threads=THREADS, head=head, attention=attention, **where),
    )


def rank_vector(vision: int, llm: int) -> dict[str, int]:
    """Ranks of all modules; the projector isn't searched."""
    return {"vision": vision, "projector": PROJECTOR_RANK, "llm": llm}


class FixedBatch:
    """Calls of an engine's chunk that train lanes on one and the same batch, without eval points: for timing steps."""

    def __init__(self, job: Job, batch: Batch, steps: int) -> None:
        """`steps` is the number of steps of a call; validation is one batch, which isn't read."""
        self._job, self._steps = job, steps
        self._schedule = Schedule(np.ones(steps, np.float32), [0, steps], per_doubling=0, chunk_steps=steps)
        self._batches = {name: np.stack([leaf] * steps) for name, leaf in batch.items()}
        self._validation = {name: leaf[None] for name, leaf in batch.items()}
        self._placed: dict[Mesh, tuple[Tree, Tree, Tree]] = {}

    def fresh(self, engine: Engine, lanes: Sequence[Lane]) -> LaneState:
        """The state of lanes in their slots, and of copies of the last lane in the others."""
        by_slot = dict(zip(lane_slots(len(lanes), engine), lanes, strict=True))
        filled = [by_slot.get(slot, lanes[-1]) for slot in range(engine.num_slots)]
        rates = self._job.config.learning_rates()
        return engine.init(
            self._job.base.params_on(engine.mesh),
            np.asarray([lane.seed for lane in filled], np.int32),
            {module: np.asarray([lane.ranks[module] for lane in filled], np.int32) for module in rates},
            {module: np.full(len(filled), rate, np.float32) for module, rate in rates.items()},
        )

    def train(self, engine: Engine, state: LaneState, lanes: int) -> tuple[LaneState, np.ndarray]:
        """Trains some number of lanes; returns the state and their losses [lanes, steps]."""
        if engine.mesh not in self._placed:
            batches, validation = (place_batches(some, engine.mesh) for some in (self._batches, self._validation))
            self._placed[engine.mesh] = batches, validation, self._job.base.params_on(engine.mesh)
        batches, validation, base = self._placed[engine.mesh]
        slots, call = lane_slots(lanes, engine), Call(0, self._steps, evaluate=False)
        work = chunk_work(engine, slots, batches, call, self._schedule, eval_batches=1)
        state, losses, _ = engine.chunk(state, base, validation, work)
        return state, np.asarray(losses)[slots]  # waits for the device
