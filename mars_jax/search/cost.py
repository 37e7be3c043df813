"""Costs of a search: what the lanes of a plan cost, and what a search that ran cost."""

import math

from mars_jax.config.load import Config
from mars_jax.errors import DoesNotFitError
from mars_jax.job import files
from mars_jax.job.job import Job
from mars_jax.lanes.halving import halving_schedule, lane_steps
from mars_jax.lanes.lane import Lane
from mars_jax.lanes.schedule import eval_steps
from mars_jax.lanes.snapshots import snapshot_bytes
from mars_jax.laws.records import read_records
from mars_jax.runtime.devices import physical_memory_bytes
from mars_jax.runtime.jsonfiles import Document
from mars_jax.search.probes.design import prefixes
from mars_jax.search.probes.run import needs_swaps
from mars_jax.search.probes.swaps import swapped
from mars_jax.search.space import job_space
from mars_jax.search.strategies.base import Budget
from mars_jax.search.strategies.registry import STRATEGIES


def lane_costs(job: Job, lanes: tuple[Lane, ...]) -> Document:
    """Costs of the lanes. The floor of memory is base and lanes' states; `step_memory_bytes` estimates all of it.

    `snapshot_bytes` is room on the disk for a group's adapters at every eval point, which module swaps read.

    Raises:
        DoesNotFitError: the floor is beyond this machine's memory.
    """
    config, grids = job.config, job.config.lora.grids
    settings = config.probe
    base_bytes, lane_bytes = job.base.num_bytes, job.engines.lane_bytes
    together = min(settings.lanes_per_program, len(lanes))
    floor = base_bytes + together * lane_bytes
    memory = physical_memory_bytes()
    if floor > memory:
        raise DoesNotFitError(
            f"{together} lanes together need at least {floor / 2**30:.1f} GiB (base {base_bytes / 2**30:.1f} GiB, "
            f"a lane {lane_bytes / 2**30:.2f} GiB), and this machine has {memory / 2**30:.1f} GiB. Lower "
            f"probe.lanes_per_program or the largest ranks, or use model.dtype: bfloat16."
        )
    points = len(eval_steps(settings.horizon, settings.looks_per_doubling)) if needs_swaps(config) else 0
    grid_size = math.prod(len(ranks) for ranks in grids.values())
    full_grid = grid_size * math.prod(len(factors) for factors in config.lora.factors.values())
    # A pick that was not trained yet has a final run too.
    runs = max(1, STRATEGIES[config.selection.method].begins(job_space(job), Budget(config.selection.sweep)))
    total = len(lanes) * settings.horizon
    return {
        "lanes": sum(len(prefixes(config, lane)) for lane in lanes),
        "runs": len(lanes),
        "lane_steps": total,
        "samples": total * settings.batch_size,
        "flops": sum(settings.horizon * job.prices.step(lane.ranks) for lane in lanes),
        "final_runs": runs,
        "final_steps": _most_final_steps(config, runs),
        "rank_vectors": grid_size,
        "full_grid_steps": full_grid * config.finetune.steps,
        "full_grid_samples": full_grid * config.finetune.steps * config.finetune.batch_size,
        "parameters_per_rank": job.base.parameters_per_rank,
        "base_bytes": base_bytes,
        "lane_bytes": lane_bytes,
        "memory_floor_bytes": floor,
        "snapshot_bytes": snapshot_bytes(together, points, job.engines.largest_lane),
        "step_memory_bytes": job.engines.step_bytes(job.engines.remat),
        "remat": job.engines.remat,
        "machine_memory_bytes": memory,
    }


def _most_final_steps(config: Config, runs: int) -> int:
    """Steps of so many final runs: of those that are halved, and otherwise as if none were stopped."""
    steps = config.finetune.steps
    halves = STRATEGIES[config.selection.method].probes == "losses"
    return lane_steps(halving_schedule(runs, steps)) if halves else runs * steps


def search_flops(job: Job) -> float:
    """FLOPs of probes and final runs of a search at their own ranks; the final run that was kept is among them."""
    config, directory = job.config, job.directory
    flops = probe_flops(job)
    if (directory / files.SWEEP).exists():
        for run in directory.read(files.SWEEP)["runs"]:
            flops += run["looks"][-1][0] / config.finetune.steps * job.prices.final_run(run["ranks"])
    return flops


def probe_flops(job: Job) -> float:
    """FLOPs of the probes at their own ranks, with eval points and module swaps."""
    config, directory, warn = job.config, job.directory, job.reporter.warn
    records = {record.lane: record for record in read_records(directory.lines(files.LANES, warn))}
    points = eval_steps(config.probe.horizon, config.probe.looks_per_doubling)
    samples, flops = config.probe.validation_samples, 0.0
    # A run that was killed while it recorded a group has noted it twice.
    groups = [event for event in directory.lines(files.EVENTS, warn) if event["event"] == "group"]
    ran = {name: steps for event in groups for name, steps in zip(event["lanes"], event["steps"], strict=True)}
    for name, steps in ran.items():
        ranks = records[name].ranks
        flops += steps * job.prices.step(ranks)
        flops += sum(0 < point <= steps for point in points) * job.prices.eval_point(ranks, samples)
    for point in directory.lines(files.CURVES, warn):
        if point.get("remaining"):
            price = job.prices.eval_point(records[point["lane"]].ranks, samples)
            flops += len(swapped(list(point["remaining"]))) * price
    return flops
