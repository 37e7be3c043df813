"""Share of the executed training steps of a probe phase that train a lane.

A compiled program has places for a fixed number of lanes. Places stay empty when lanes stop early or don't fill the
last block, and their steps are wasted. The probes of the demo run as in `mars probe`, with its stopping rule and
checkpoints. Also measured is what the host adds to their time.

    python -m benchmarks.speed.useful_steps [--short] [--anyway] [--out FOLDER]

Definitions. The lanes are those of configs/demo.yaml, with a run for each of two D. The host's work is waiting for
batches, saving checkpoints, the convergence rule, and the fits of both laws. Its seconds are compared with those of the
probe phase without compiling. The host waits for the device when it reads results, after each call of the chunk, and
nowhere else. The device waits for batches when a call's batches are ready only after the call before has ended. Reading
is also timed by itself, first and with the pictures cached.

figure = lane-steps / executed lane-steps.
"""

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from mars_jax.runtime.environment import cpu_device_for_each_core

# Read when JAX and XLA are loaded.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ |= cpu_device_for_each_core()

import jax

from benchmarks.lib.child import SEPARATE, Document, Warnings, arguments, demo_config, publish
from benchmarks.lib.costs import Cost, chunk_calls
from benchmarks.lib.results import require_quiet
from mars_jax.config.load import Config
from mars_jax.data.batches import Batch
from mars_jax.job.job import Job, make_job
from mars_jax.job.programs import Program, probe_programs
from mars_jax.lanes.eval_points import Points
from mars_jax.lanes.feed import Stream
from mars_jax.lanes.inputs import Hooks
from mars_jax.lanes.lane import Lane
from mars_jax.lanes.loop import run_group
from mars_jax.lanes.result import Progress
from mars_jax.lanes.schedule import Schedule
from mars_jax.laws.records import LaneRecord
from mars_jax.runtime.checkpoint import Checkpoints
from mars_jax.runtime.compile_cache import CompileCounter
from mars_jax.search.probes.design import planned_lanes
from mars_jax.search.probes.records import convergence_rule, lane_records
from mars_jax.search.probes.run import probe_schedule
from mars_jax.search.space import fit_records

T = TypeVar("T")

SHORT = (
    "lora.modules.vision.ranks=[2,8]",
    "lora.modules.llm.ranks=[2,8]",
    "probe.steps=16",
    "probe.num_samples=[64,256]",
    # Lanes this short haven't converged by the demo's rule.
    "probe.corners=true",
    "convergence.rule=drift",
    "convergence.epsilon=0.9",
    "convergence.sustain=1",
)


class TimedStream:
    """A stream that remembers when each batch was ready, and how long the making took; threads may share it."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._lock = threading.Lock()
        self.ready: dict[int, float] = {}
        self.seconds = 0.0

    def __getitem__(self, step: int) -> Batch:
        """The batch of a step."""
        start = time.perf_counter()
        batch = self._stream[step]
        end = time.perf_counter()
        with self._lock:
            self.ready[step] = end
            self.seconds += end - start
        return batch


class TimedCheckpoints(Checkpoints):
    """Checkpoints that count the seconds for which a save holds up the loop."""

    seconds, saves = 0.0, 0

    def save(self, step: int, state: Any, document: Mapping[str, Any]) -> None:
        """As it is, timed."""
        start = time.perf_counter()
        super().save(step, state, document)
        self.seconds += time.perf_counter() - start
        self.saves += 1


def main() -> None:
    """Writes results/useful_steps.json; about three minutes."""
    options = arguments(__doc__)
    load = require_quiet(options.anyway)
    with TemporaryDirectory() as folder:
        config = demo_config(folder, (*SEPARATE, *(SHORT if options.short else ())))
        job = make_job(config, Warnings())
        programs = probe_programs(job, planned_lanes(config), job.engines.default_lane_block)
        schedule = probe_schedule(config, job.base.model_config.text.vocab_size)
        groups = [
            run_one(job, program, group, schedule, Path(folder) / group[0].name)
            for program in programs
            for group in program.groups
        ]
        reading = reading_alone(make_job(config, Warnings()), programs[0].groups[0][0], schedule)
    curves = [group.pop("curves") for group in groups]
    records, record_seconds = timed(lambda: all_records(config, curves))
    _, record_seconds_again = timed(lambda: all_records(config, curves))
    with CompileCounter() as counter:
        _, fit_seconds = timed(lambda: fit_records(config, records))
    _, fit_seconds_again = timed(lambda: fit_records(config, records))

    cost = Cost(sum(g["lane_steps"] for g in groups), sum(g["executed_lane_steps"] for g in groups))
    seconds = sum(group["seconds"] for group in groups)
    calls = sum(group["chunk_calls"] for group in groups)
    shares = {
        "convergence rule and records": (record_seconds_again, record_seconds),
        "fits of the laws and their bootstraps": (fit_seconds_again, fit_seconds),
        "waiting for batches": (sum(group["waiting_seconds"] for group in groups), None),
        "saving checkpoints": (sum(group["save_seconds"] for group in groups), None),
    }
    publish(
        options,
        "useful_steps",
        cost.utilisation,
        "useful lane-steps / executed lane-steps of the demo's probe phase",
        "at least 0.9",
        {
            "foreign_cores_busy": load,
            "probe_seconds": seconds,
            "compile_seconds": sum(group["compile_seconds"] for group in groups),
            "fit_compile_seconds": counter.seconds,
            "host_syncs_per_1000_lane_steps": 1000 * calls / cost.lane_steps,
            "host_syncs_per_1000_steps": 1000 * calls / sum(group["steps"] for group in groups),
            "groups": groups,
            "tables": {
                "Groups of lanes": [
                    {
                        "lanes": len(group["lanes"]),
                        "samples": group["num_samples"],
                        "left early": sum(end < schedule.horizon for end in group["ends"]),
                        "lane-steps": group["lane_steps"],
                        "executed": group["executed_lane_steps"],
                        "useful": group["lane_steps"] / group["executed_lane_steps"],
                        "seconds": group["seconds"],
                        "calls of the chunk": group["chunk_calls"],
                        "seconds a call": group["seconds"] / group["chunk_calls"],
                    }
                    for group in groups
                ],
                "Reading the first group's batches while nothing else runs, seconds a call": [reading],
                "Share of the probe phase (compiling apart)": [
                    {
                        "host work": name,
                        "seconds": spent,
                        "share": spent / seconds,
                        "the first time, compiling included": first,
                    }
                    for name, (spent, first) in shares.items()
                ],
            },
        },
    )


def run_one(job: Job, program: Program, group: Sequence[Lane], schedule: Schedule, folder: Path) -> Document:
    """Runs a group of lanes; its steps, times and eval points."""
    inputs = job.inputs.probes(group[0], program.engine)
    stream = TimedStream(inputs.stream)
    inputs = replace(inputs, base=jax.block_until_ready(inputs.base), stream=stream)
    ended: dict[int, float] = {}  # step -> when the call up to it was over

    def advance(progress: Progress) -> None:
        ended[progress.step] = time.perf_counter()

    with CompileCounter() as counter, TimedCheckpoints(folder) as checkpoints:
        start = time.perf_counter()
        result = run_group(group, program.engine, inputs, schedule, Hooks(checkpoints, advance=advance))
        seconds = time.perf_counter() - start
    ends = [points[-1].step for points in result.points]
    return {
        "lanes": [lane.name for lane in group],
        "num_samples": group[0].num_samples,
        "ends": ends,
        "steps": max(ends),
        "lane_steps": result.useful_steps,
        "executed_lane_steps": result.executed_steps,
        "chunk_calls": chunk_calls([step for step in schedule.eval_steps if step <= max(ends)], schedule.chunk_steps),
        "seconds": seconds - counter.seconds,
        "compile_seconds": counter.seconds,
        "waiting_seconds": waiting(stream.ready, ended),
        "save_seconds": checkpoints.seconds,
        "saves": checkpoints.saves,
        "curves": (group, result.points),
    }


def waiting(ready: Mapping[int, float], ended: Mapping[int, float]) -> float:
    """Seconds for which a call's batches were still being made when the call before was over."""
    stops = sorted(ended)
    total = 0.0
    for before, stop in pairwise(stops):
        made = max(when for step, when in ready.items() if before <= step < stop)
        total += max(0.0, made - ended[before])
    return total


def reading_alone(job: Job, lane: Lane, schedule: Schedule) -> Document:
    """Reads a lane's batches one after the other, twice; the job must be new, for its pictures to be unread."""
    calls = chunk_calls(schedule.eval_steps, schedule.chunk_steps)

    def read() -> float:
        stream = job.data.probe_stream(lane, cached_encoder=False)
        return timed(lambda: [stream[step] for step in range(schedule.horizon)])[1] / calls

    job.data.search  # noqa: B018 - what is read of the files is no part of a batch
    return {"samples": lane.num_samples, "pictures read": read(), "pictures cached": read()}


def all_records(config: Config, curves: Sequence[tuple[Sequence[Lane], Sequence[Points]]]) -> list[LaneRecord]:
    """The records of every group, group by group as a run makes them."""
    rule, rates = convergence_rule(config), config.learning_rates()
    return [record for lanes, points in curves for record in lane_records(lanes, points, rule, rates)]


def timed(call: Callable[[], T]) -> tuple[T, float]:
    """The call's value and its seconds."""
    start = time.perf_counter()
    value = call()
    return value, time.perf_counter() - start


if __name__ == "__main__":
    main()
