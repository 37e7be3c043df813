"""How many lanes run in one vectorised step: measured on the run's own programs where that pays, and kept with the run.

The block changes the order of sums, so a run that goes on must use the one that it began with.
"""

import time
from collections.abc import Sequence
from dataclasses import replace

from mars_jax.job import files
from mars_jax.job.job import Job
from mars_jax.job.prices import compile_flops
from mars_jax.job.programs import Program, probe_programs
from mars_jax.lanes.inputs import Hooks
from mars_jax.lanes.lane import Lane
from mars_jax.lanes.loop import run_group
from mars_jax.lanes.result import Progress
from mars_jax.runtime.jsonfiles import write_json
from mars_jax.search.probes.run import probe_schedule

# A measurement compiles about four programs; it is made if the probes cost ten times as much.
_WORTH_COMPILES = 40


def lane_block(job: Job) -> int:
    """The block of the config, of this run's measurement, or of the device where a measurement doesn't pay."""
    asked = job.config.probe.lane_block
    if asked != "auto":
        return asked
    if not (job.directory / files.LANE_BLOCK).exists():
        return job.engines.default_lane_block
    block: int = job.directory.read(files.LANE_BLOCK)["lane_block"]
    return block


def measure_lane_block(job: Job, lanes: tuple[Lane, ...]) -> None:
    """Measures blocks of 1, 2, 4, ... lanes and records the fastest, if the config leaves it open and it pays."""
    settings, directory = job.config.probe, job.directory
    total = sum(settings.horizon * job.prices.step(lane.ranks) for lane in lanes)
    pays = total >= _WORTH_COMPILES * compile_flops() and settings.horizon >= 3 * settings.chunk_steps
    known = (directory / files.LANE_BLOCK).exists() or (directory / files.LANES).exists()
    if settings.lane_block != "auto" or not pays or known:
        return
    job.reporter.notice("probe: measuring how many lanes to run in one step")
    seconds: dict[int, float] = {}
    block = 1
    while (program := _largest(probe_programs(job, lanes, block))).engine.lane_block == block:
        seconds[block] = _seconds_per_lane_step(job, program)
        if seconds[block] > 1.1 * min(seconds.values()):
            break
        block *= 2
    best = min(seconds, key=lambda block: seconds[block])
    write_json(directory / files.LANE_BLOCK, {"lane_block": best, "seconds_per_lane_step": seconds})
    measured = ", ".join(f"{block}: {1000 * value:.1f} ms" for block, value in seconds.items())
    job.reporter.notice(f"probe: blocks of {best} (milliseconds a lane-step by block: {measured})")


def _largest(programs: Sequence[Program]) -> Program:
    return max(programs, key=lambda program: len(program.bucket.lanes))


def _seconds_per_lane_step(job: Job, program: Program) -> float:
    """Time of a lane-step in the largest group of a program, after what is compiled at first."""
    group = max(program.groups, key=len)
    chunk = job.config.probe.chunk_steps
    reached: dict[int, float] = {}

    def advance(progress: Progress) -> None:
        reached[progress.step] = time.perf_counter()

    schedule = probe_schedule(job.config, job.base.model_config.text.vocab_size)
    schedule = replace(schedule, eval_steps=[0, chunk, 3 * chunk], per_doubling=0)
    run_group(group, program.engine, job.inputs.probes(group[0], program.engine), schedule, Hooks(advance=advance))
    return (reached[3 * chunk] - reached[chunk]) / (2 * chunk * len(group))
