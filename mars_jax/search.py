"""The probe phase: which lanes a config asks for, what they cost, and running them in groups that survive a kill.

The compiled part is `probe.engine`, the loop over one group `probe.loop`; the laws come after.
"""

import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from mars_jax import lora
from mars_jax.checkpoint import Checkpoints
from mars_jax.config import Config
from mars_jax.convergence import ConvergenceRule
from mars_jax.errors import DoesNotFitError
from mars_jax.jsonfiles import append_jsonl, read_jsonl
from mars_jax.probe.loop import Schedule, run_group, warmup_multipliers
from mars_jax.probe.plan import Lane, look_steps, plan_lanes
from mars_jax.probe.records import lane_records
from mars_jax.rundir import RunDirectory
from mars_jax.workspace import Workspace, physical_memory_bytes


def planned_lanes(config: Config) -> tuple[Lane, ...]:
    """The lanes of a config."""
    return plan_lanes(
        {name: module.ranks for name, module in config.lora.modules.items()},
        config.probe.num_samples,
        config.probe.seeds,
        corners=config.probe.corners,
        single_module=config.convergence.rule == "loss_fraction",
    )


def lane_costs(workspace: Workspace, lanes: tuple[Lane, ...]) -> dict[str, Any]:
    """What the lanes cost; the memory is a floor: base, adapters with their optimizer state, batches held.

    Raises:
        DoesNotFitError: the floor is beyond this machine's memory.
    """
    config = workspace.config
    settings = config.probe
    per_rank = lora.parameters_per_rank(workspace.targets)
    base_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(workspace.abstract_base))
    largest = sum(max(workspace.grids[module]) * count for module, count in per_rank.items())
    # a and b, their gradients, two Adam moments, the best and the snapshots, float32.
    lane_bytes = 4 * largest * (5 + settings.looks_per_doubling)
    together = min(settings.lanes_per_program, len(lanes))
    floor = base_bytes + together * lane_bytes
    memory = physical_memory_bytes()
    if floor > memory:
        raise DoesNotFitError(
            f"{together} lanes together need at least {floor / 2**30:.1f} GiB (base {base_bytes / 2**30:.1f} GiB, "
            f"a lane {lane_bytes / 2**30:.2f} GiB), and this machine has {memory / 2**30:.1f} GiB. Lower "
            f"probe.lanes_per_program or the largest ranks, or use model.dtype: bfloat16."
        )
    grid_size = int(np.prod([len(ranks) for ranks in workspace.grids.values()]))
    return {
        "lanes": len(lanes),
        "lane_steps": len(lanes) * settings.steps,
        "samples": len(lanes) * settings.steps * settings.batch_size,
        "rank_vectors": grid_size,
        "full_grid_steps": grid_size * config.finetune.steps,
        "full_grid_samples": grid_size * config.finetune.steps * config.finetune.batch_size,
        "parameters_per_rank": per_rank,
        "base_bytes": base_bytes,
        "lane_bytes": lane_bytes,
        "memory_floor_bytes": floor,
        "machine_memory_bytes": memory,
    }


def convergence_rule(config: Config) -> ConvergenceRule:
    """The rule of a config; each has its own default threshold."""
    settings = config.convergence
    epsilon = settings.epsilon or {"loss_fraction": 0.1, "drift": 0.3}[settings.rule]
    return ConvergenceRule(settings.rule, epsilon, settings.sustain)


def run_probes(workspace: Workspace, lanes: tuple[Lane, ...], directory: RunDirectory) -> None:
    """Runs lanes in groups of one size, one compiled program for all; a finished group is never run again."""
    config, reporter = workspace.config, workspace.reporter
    settings = config.probe
    workspace.check_sizes()
    groups, size = lane_groups(lanes, settings.lanes_per_program)
    looks = look_steps(settings.steps, settings.looks_per_doubling)
    schedule = Schedule(
        warmup_multipliers(settings.steps, config.optimizer.warmup_steps, "constant"),
        looks,
        settings.looks_per_doubling,
        settings.chunk_steps,
    )
    rule = convergence_rule(config)
    rates = workspace.learning_rates()
    recorded = {record["lane"] for record in read_jsonl(directory.lanes_file, reporter.warn)}
    validation = workspace.validation_batches(settings.validation_samples, settings.batch_size)
    with reporter.progress("probe", len(lanes) * settings.steps, "lane-steps") as advance:
        for group in groups:
            if all(lane.name in recorded for lane in group):
                advance(len(group) * settings.steps, "done before")
                continue
            # A short group is filled up, so that it runs in the program of the others.
            filled = group + group[-1:] * (size - len(group))
            checkpoint_directory = directory.probe_checkpoints / group[0].name
            with Checkpoints(checkpoint_directory) as checkpoints:
                result = run_group(
                    filled,
                    workspace.probe_engine,
                    workspace.base,
                    lambda lane: workspace.stream(lane, settings.batch_size),
                    validation,
                    rates,
                    schedule,
                    checkpoints=checkpoints,
                    advance=partial(_advance_real, advance, len(group) / size),
                )
            rows = result.rows[: len(group)]
            records = lane_records(group, rows, rule, rates)
            _append_curves(directory, group, rows)
            for record in records:
                if record["lane"] not in recorded:
                    append_jsonl(directory.lanes_file, record)
                if record["status"] == "diverged":
                    reporter.warn(f"lane {record['lane']} diverged: {record['reason']}")
            shutil.rmtree(checkpoint_directory)


def lane_groups(lanes: Sequence[Lane], most: int) -> tuple[list[tuple[Lane, ...]], int]:
    """Cuts lanes into groups that share their data, and gives the size of the largest group.

    A group reads one stream, so that every group runs in the same program; within each (num_samples, seed) the groups
    are as equal as can be.
    """
    shared: dict[tuple[int, int], list[Lane]] = {}
    for lane in lanes:
        shared.setdefault((lane.num_samples, lane.seed), []).append(lane)
    size = max(-(-len(alike) // -(-len(alike) // most)) for alike in shared.values())
    groups = [tuple(alike[i : i + size]) for alike in shared.values() for i in range(0, len(alike), size)]
    return groups, size


def _advance_real(advance: Callable[[int, str], None], real: float, steps: int, text: str) -> None:
    """Counts lane-steps of real lanes only, not of those that fill up a group."""
    advance(round(steps * real), text)


def _append_curves(directory: RunDirectory, lanes: tuple[Lane, ...], rows: list[list[dict[str, Any]]]) -> None:
    """Adds the looks of a group, but for those that a killed run had got to."""
    known = Counter(record["lane"] for record in read_jsonl(directory.curves_file, lambda text: None))
    for lane, lane_rows in zip(lanes, rows, strict=True):
        for row in lane_rows[known[lane.name] :]:
            append_jsonl(directory.curves_file, {"lane": lane.name, **row})
