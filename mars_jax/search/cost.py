"""Costs of a search: lanes, FLOPs, seconds."""

from typing import Any

import numpy as np

from mars_jax.adapters.targets import parameters_per_rank
from mars_jax.errors import DoesNotFitError
from mars_jax.job.directory import RunDirectory
from mars_jax.job.prices import look_flops, step_flops
from mars_jax.job.workspace import Workspace
from mars_jax.lanes import halving
from mars_jax.lanes.lane import Lane, Ranks
from mars_jax.lanes.schedule import look_steps
from mars_jax.lanes.snapshots import snapshot_bytes
from mars_jax.models.memory import lane_state_bytes
from mars_jax.runtime.devices import physical_memory_bytes
from mars_jax.runtime.jsonfiles import read_json, read_jsonl
from mars_jax.search.finals import final_schedule
from mars_jax.search.probes.design import readings, sweep_size
from mars_jax.search.probes.run import probe_schedule
from mars_jax.search.probes.swaps import hybrids
from mars_jax.search.selection import Selection


def search_cost(workspace: Workspace, selection: Selection, directory: RunDirectory) -> tuple[float, float]:
    """FLOPs of probes and sweep at their own ranks, with looks and hybrids, less the final run that the sweep leaves;
    and seconds of the phases up to the pick, that run's among them."""
    config, warn = workspace.config, workspace.reporter.warn
    records = {record["lane"]: record for record in read_jsonl(directory.lanes_file, warn)}
    looks, samples = probe_schedule(workspace).looks, config.probe.validation_samples
    flops = 0.0
    for event in read_jsonl(directory.events_file, warn):
        if event["event"] == "group":
            for name, steps in zip(event["lanes"], event["steps"], strict=True):
                ranks = records[name]["ranks"]
                flops += steps * step_flops(workspace, ranks)
                flops += sum(0 < look <= steps for look in looks) * look_flops(workspace, ranks, samples)
    for row in read_jsonl(directory.curves_file, warn):
        if row.get("remaining"):
            flops += len(hybrids(list(row["remaining"]))) * look_flops(
                workspace, records[row["lane"]]["ranks"], samples
            )
    if selection.method == "local_sweep":
        # The pick's own run is counted with its trial.
        flops -= final_flops(workspace, _whole(workspace, selection.pick))
        for run in read_json(directory.sweep_file)["runs"]:
            flops += run["looks"][-1][0] / config.finetune.steps * final_flops(workspace, run["ranks"])
    phases = directory.state()["phases"]
    return flops, sum(phases[name]["seconds"] for name in ("probe", "fit", "select") if name in phases)


def final_flops(workspace: Workspace, ranks: Ranks) -> float:
    """FLOPs of a final run with its looks."""
    settings, probe = workspace.config.finetune, workspace.config.probe
    steps = settings.steps * step_flops(workspace, ranks) * settings.batch_size / probe.batch_size
    return steps + (len(final_schedule(workspace).looks) - 1) * look_flops(
        workspace, ranks, settings.validation_samples
    )


def _whole(workspace: Workspace, ranks: Ranks) -> dict[str, int]:
    return dict.fromkeys(workspace.grids, 0) | dict(ranks)


def lane_costs(workspace: Workspace, lanes: tuple[Lane, ...]) -> dict[str, Any]:
    """What the lanes cost. The floor of memory is base and lanes' states; `step_memory_bytes` estimates all of it.

    `snapshot_bytes` is room on the disk for a group's adapters at every look, which the rule `splice` compares.

    Raises:
        DoesNotFitError: the floor is beyond this machine's memory.
    """
    config = workspace.config
    settings = config.probe
    per_rank = parameters_per_rank(workspace.targets)
    base_bytes = workspace.base_bytes
    largest = sum(max(workspace.grids[module]) * count for module, count in per_rank.items())
    lane_bytes = lane_state_bytes(largest, settings.looks_per_doubling)
    together = min(settings.lanes_per_program, len(lanes))
    floor = base_bytes + together * lane_bytes
    memory = physical_memory_bytes()
    if floor > memory:
        raise DoesNotFitError(
            f"{together} lanes together need at least {floor / 2**30:.1f} GiB (base {base_bytes / 2**30:.1f} GiB, "
            f"a lane {lane_bytes / 2**30:.2f} GiB), and this machine has {memory / 2**30:.1f} GiB. Lower "
            f"probe.lanes_per_program or the largest ranks, or use model.dtype: bfloat16."
        )
    looks = len(look_steps(settings.horizon, settings.looks_per_doubling)) if config.convergence.rule == "splice" else 0
    grid_size = int(np.prod([len(ranks) for ranks in workspace.grids.values()]))
    swept = sweep_size(config, lanes)
    lane_steps = len(lanes) * settings.horizon
    return {
        "lanes": sum(len(readings(config, lane)) for lane in lanes),
        "runs": len(lanes),
        "lane_steps": lane_steps,
        "samples": lane_steps * settings.batch_size,
        "flops": sum(settings.horizon * step_flops(workspace, lane.ranks) for lane in lanes),
        "final_runs": swept,
        "final_steps": halving.lane_steps(halving.halving_schedule(swept, config.finetune.steps)),
        "rank_vectors": grid_size,
        "full_grid_steps": grid_size * config.finetune.steps,
        "full_grid_samples": grid_size * config.finetune.steps * config.finetune.batch_size,
        "parameters_per_rank": per_rank,
        "base_bytes": base_bytes,
        "lane_bytes": lane_bytes,
        "memory_floor_bytes": floor,
        "snapshot_bytes": snapshot_bytes(together, looks, largest),
        "step_memory_bytes": workspace.step_bytes(workspace.remat),
        "remat": workspace.remat,
        "machine_memory_bytes": memory,
    }
