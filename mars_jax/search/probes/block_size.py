"""How many lanes run in one vectorised step: measured on the run's own programs where that pays, and kept with the run.

The block changes the order of sums, so a run that goes on must use the one that it began with.
"""

import time
from collections.abc import Sequence
from dataclasses import replace

from mars_jax.job.directory import RunDirectory
from mars_jax.job.prices import compile_flops, step_flops
from mars_jax.job.programs import Program, probe_programs
from mars_jax.job.workspace import Workspace
from mars_jax.lanes.lane import Lane
from mars_jax.lanes.result import Progress
from mars_jax.runtime.jsonfiles import read_json, write_json
from mars_jax.search.probes.run import probe_schedule, run_probe_group

# A measurement compiles about four programs; it is made if the probes cost ten times as much.
_WORTH_COMPILES = 40


def lane_block(workspace: Workspace, directory: RunDirectory) -> int:
    """The block of the config, of this run's measurement, or of the device where a measurement doesn't pay."""
    asked = workspace.config.probe.lane_block
    if asked != "auto":
        return asked
    if directory.lane_block_file.exists():
        return read_json(directory.lane_block_file)["lane_block"]
    return workspace.default_lane_block


def tune_lane_block(workspace: Workspace, lanes: tuple[Lane, ...], directory: RunDirectory) -> None:
    """Measures blocks of 1, 2, 4, ... lanes and records the fastest, if the config leaves it open and it pays."""
    settings = workspace.config.probe
    total = sum(settings.horizon * step_flops(workspace, lane.ranks) for lane in lanes)
    pays = total >= _WORTH_COMPILES * compile_flops() and settings.horizon >= 3 * settings.chunk_steps
    if settings.lane_block != "auto" or not pays or directory.lane_block_file.exists() or directory.lanes_file.exists():
        return
    workspace.reporter.notice("probe: measuring how many lanes to run in one step")
    seconds: dict[int, float] = {}
    block = 1
    while (program := _largest(probe_programs(workspace, lanes, block))).engine.lane_block == block:
        seconds[block] = _seconds_per_lane_step(workspace, program)
        if seconds[block] > 1.1 * min(seconds.values()):
            break
        block *= 2
    best = min(seconds, key=lambda block: seconds[block])
    write_json(directory.lane_block_file, {"lane_block": best, "seconds_per_lane_step": seconds})
    told = ", ".join(f"{block}: {1000 * value:.1f} ms" for block, value in seconds.items())
    workspace.reporter.notice(f"probe: blocks of {best} (milliseconds a lane-step by block: {told})")


def _largest(programs: Sequence[Program]) -> Program:
    return max(programs, key=lambda program: len(program.bucket.lanes))


def _seconds_per_lane_step(workspace: Workspace, program: Program) -> float:
    """Time of a lane-step in the largest group of a program, after what is compiled at first."""
    group = max(program.groups, key=len)
    chunk = workspace.config.probe.chunk_steps
    told: dict[int, float] = {}

    def advance(progress: Progress) -> None:
        told[progress.step] = time.perf_counter()

    schedule = replace(probe_schedule(workspace), looks=[0, chunk, 3 * chunk], looks_per_doubling=0)
    run_probe_group(workspace, program, group, schedule, advance=advance)
    return (told[3 * chunk] - told[chunk]) / (2 * chunk * len(group))
