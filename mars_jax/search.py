"""The probe phase: which lanes a config asks for, what they cost, and running them in groups that survive a kill.

The compiled part is `probe.engine`, the loop over one group `probe.loop`; the laws come after.
"""

import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from mars_jax import halving, lora
from mars_jax.adapterfiles import write_adapters
from mars_jax.checkpoint import Checkpoints
from mars_jax.checks import check_sizes
from mars_jax.config import Config
from mars_jax.convergence import ConvergenceRule, RuleName
from mars_jax.devices import physical_memory_bytes
from mars_jax.errors import DoesNotFitError
from mars_jax.interrupts import Interrupts
from mars_jax.jsonfiles import append_jsonl, read_jsonl, write_json
from mars_jax.memory import lane_state_bytes
from mars_jax.probe.leaving import Leaving, ceiling_of
from mars_jax.probe.loop import (
    GroupResult,
    Progress,
    Rates,
    Row,
    Schedule,
    best_adapters,
    run_group,
    warmup_multipliers,
)
from mars_jax.probe.plan import Lane, Ranks, look_steps, plan_lanes
from mars_jax.probe.reading import Adapters, losses_of
from mars_jax.probe.records import lane_records
from mars_jax.probe.snapshots import Snapshots, snapshot_bytes
from mars_jax.probe.splice import Reading, count_hybrids, parties, remaining_losses
from mars_jax.programs import Program, step_flops
from mars_jax.progress import Advance
from mars_jax.rundir import RunDirectory, memory_bytes
from mars_jax.workspace import Workspace

# The threshold of each rule, where the config has none.
EPSILONS: dict[RuleName, float] = {"loss_fraction": 0.1, "splice": 0.1, "drift": 0.3}
# Beside the checkpoints of a group.
SNAPSHOTS = "adapters.f32"


def planned_lanes(config: Config) -> tuple[Lane, ...]:
    """The lanes of a config; with nested sampling those of the largest D, which are read at every D."""
    settings = config.probe
    return plan_lanes(
        {name: module.ranks for name, module in config.lora.modules.items()},
        settings.num_samples[-1:] if settings.sampling == "nested" else settings.num_samples,
        settings.seeds,
        corners=settings.corners,
        single_module=config.convergence.rule == "loss_fraction",
    )


def readings(config: Config, lane: Lane) -> list[tuple[Lane, int]]:
    """What is read off a lane: a lane for each D, and its number of steps."""
    settings = config.probe
    if settings.sampling == "separate":
        return [(lane, settings.horizon)]
    return [(replace(lane, num_samples=size), size // settings.batch_size) for size in reversed(settings.num_samples)]


def lane_costs(workspace: Workspace, lanes: tuple[Lane, ...]) -> dict[str, Any]:
    """What the lanes cost. The floor of memory is base and lanes' states; `step_memory_bytes` estimates all of it.

    `snapshot_bytes` is room on the disk for a group's adapters at every look, which the rule `splice` compares.

    Raises:
        DoesNotFitError: the floor is beyond this machine's memory.
    """
    config = workspace.config
    settings = config.probe
    per_rank = lora.parameters_per_rank(workspace.targets)
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


def sweep_size(config: Config, lanes: Sequence[Lane]) -> int:
    """Final runs that are begun: as many as the sweep takes of the rank vectors that adapt all modules; else one."""
    if config.selection.method != "laws":
        return 1
    most = max(len(lane.adapted) for lane in lanes)
    joint = {tuple(lane.ranks.items()) for lane in lanes if len(lane.adapted) == most}
    return min(config.selection.sweep, config.probe.lanes_per_program, len(joint))


def probed_losses(records: Sequence[Mapping[str, Any]], modules: Sequence[str]) -> list[tuple[Ranks, float]]:
    """(ranks, lowest validation loss in nats) of the lanes that adapt all of some modules, at the largest D."""
    joint = [r for r in records if set(r["adapted"]) == set(modules) and r["status"] != "diverged"]
    largest = max((record["num_samples"] for record in joint), default=0)
    return [
        ({module: record["ranks"][module] for module in modules}, record["best_loss"])
        for record in joint
        if record["num_samples"] == largest
    ]


def convergence_rule(config: Config) -> ConvergenceRule | None:
    """The rule of a config, if it has one; each has its own default threshold."""
    settings = config.convergence
    if settings.rule is None:
        return None
    return ConvergenceRule(settings.rule, settings.epsilon or EPSILONS[settings.rule], settings.sustain)


def run_probes(
    workspace: Workspace, lanes: Sequence[Lane], programs: Sequence[Program], directory: RunDirectory
) -> None:
    """Runs lanes in the groups of their programs; a finished group is never run again."""
    config, reporter = workspace.config, workspace.reporter
    check_sizes(workspace)
    schedule = probe_schedule(workspace)
    recorded = {record["lane"] for record in read_jsonl(directory.lanes_file, reporter.warn)}
    remaining = []
    for program in programs:
        for group in program.groups:
            if all(read.name in recorded for lane in group for read, _ in readings(config, lane)):
                # Left there if a run was killed after the last record.
                shutil.rmtree(directory.probe_checkpoints / group[0].name, ignore_errors=True)
            else:
                remaining.append((program, group))
    done_before = len(lanes) - sum(len(group) for _, group in remaining)
    with Interrupts() as interrupts, _following(workspace, len(lanes), done_before, directory) as follow:
        for program, group in remaining:
            checkpoint_directory = directory.probe_checkpoints / group[0].name
            with ExitStack() as stack:
                checkpoints = stack.enter_context(Checkpoints(checkpoint_directory, reporter.warn))
                snapshots = None
                if config.convergence.rule == "splice":
                    file, size = checkpoint_directory / SNAPSHOTS, program.engine.layout.size
                    snapshots = stack.enter_context(Snapshots(file, schedule.looks, len(group), size))
                result = run_probe_group(
                    workspace,
                    program,
                    group,
                    schedule,
                    checkpoints=checkpoints,
                    snapshots=snapshots,
                    interrupts=interrupts,
                    advance=partial(follow, len(group)),
                )
                _record_group(workspace, program, group, result, snapshots, recorded, directory)
            shutil.rmtree(checkpoint_directory)


def probe_schedule(workspace: Workspace) -> Schedule:
    """Steps and looks of every probe."""
    settings = workspace.config.probe
    return Schedule(
        warmup_multipliers(settings.horizon, workspace.config.optimizer.warmup_steps, "constant"),
        look_steps(settings.horizon, settings.looks_per_doubling),
        settings.looks_per_doubling,
        settings.chunk_steps,
        Leaving(settings.patience, ceiling_of(workspace.model_config.text.vocab_size)),
        averaging=settings.averaging,
    )


def run_probe_group(
    workspace: Workspace,
    program: Program,
    group: Sequence[Lane],
    schedule: Schedule,
    learning_rates: Rates | Sequence[Rates] | None = None,
    **options: Any,
) -> GroupResult:
    """Runs one group of a program, at the config's learning rates unless given; `options` are those of `run_group`."""
    settings = workspace.config.probe
    cached = program.bucket.cached_encoder
    return run_group(
        group,
        program.engine,
        workspace.base_on(program.engine.mesh),
        workspace.probe_stream(group[0], cached_encoder=cached),
        workspace.validation_batches(settings.batch_size, cached_encoder=cached),
        learning_rates or workspace.learning_rates(),
        schedule,
        look_batches=workspace.look_batches(settings.validation_samples, settings.batch_size),
        **options,
    )


def splice_probes(
    workspace: Workspace,
    program: Program,
    group: Sequence[Lane],
    result: GroupResult,
    snapshots: Snapshots,
    reads: Sequence[Lane],
    curves: Sequence[Sequence[Row]],
) -> list[list[Row]]:
    """Rows with what remained for each module, see `Remaining.to_json`; uses up the group's state.

    Args:
        workspace: of the run.
        program: that ran the group.
        group: its lanes.
        result: what it left.
        snapshots: the adapters of its looks.
        reads: what is read off its lanes, see `readings`.
        curves: the rows of each of `reads`.
    """
    settings, engine = workspace.config.probe, program.engine
    cached = program.bucket.cached_encoder
    places = [k for k, lane in enumerate(group) for _ in readings(workspace.config, lane)]
    searched = [module for module, ranks in workspace.grids.items() if len(ranks) > 1]
    wanted = [
        Reading(k, parties(read.adapted, searched), rows) for k, read, rows in zip(places, reads, curves, strict=True)
    ]
    with workspace.reporter.progress("splice", count_hybrids(wanted), "hybrids") as advance:

        def losses(adapters: Iterable[Adapters]) -> list[float]:
            def told() -> Iterator[Adapters]:
                for mixed in adapters:
                    yield mixed
                    advance(1, "")

            return losses_of(
                told(),
                engine,
                result.state,
                workspace.base_on(engine.mesh),
                workspace.probe_stream(group[0], cached_encoder=cached)[0],
                workspace.validation_batches(settings.batch_size, cached_encoder=cached),
                chunk_steps=settings.chunk_steps,
                look_batches=workspace.look_batches(settings.validation_samples, settings.batch_size),
            )

        found = remaining_losses(engine, result, snapshots, wanted, losses)
    return [
        [
            {**row, "remaining": {}, "interaction": None, "hybrids": {}} if left is None else {**row, **left.to_json()}
            for row, left in zip(rows, remaining, strict=True)
        ]
        for rows, remaining in zip(curves, found, strict=True)
    ]


@contextmanager
def _following(
    workspace: Workspace, lanes: int, done_before: int, directory: RunDirectory
) -> Iterator[Callable[[int, Progress], None]]:
    """Tells the user and `progress.json` how the phase stands: lanes done, running, queued, steps, loss, memory.

    Yields what is to be called with the size of a group and its progress.
    """
    horizon = workspace.config.probe.horizon
    lanes_done, steps, total = done_before, done_before * horizon, lanes * horizon
    last_write = 0.0
    advance: Advance | None = None
    with ExitStack() as stack:

        def follow(size: int, progress: Progress) -> None:
            nonlocal lanes_done, steps, last_write, advance
            steps += progress.lane_steps
            running = progress.running if progress.step < horizon else 0
            counts = {"done": lanes_done + size - running, "running": running, "queued": lanes - lanes_done - size}
            if not running:
                lanes_done += size
            memory = memory_bytes()
            if advance is None:
                # What a killed run had done is told first, and took no time of this one.
                advance = stack.enter_context(workspace.reporter.progress("probe", total, "lane-steps", done=steps))
            else:
                told = ", ".join(f"{number} {name}" for name, number in counts.items())
                loss = "" if np.isnan(progress.loss) else f", loss {progress.loss:.3f}"
                detail = f"lanes {told}; step {progress.step}{loss}, {memory / 2**30:.1f} GiB"
                advance(progress.lane_steps, detail)
            if time.monotonic() - last_write > 1.0 or not running:
                status = {
                    "phase": "probe",
                    "lanes": counts,
                    "step": progress.step,
                    "lane_steps": {"done": steps, "total": total},
                    "validation_loss": progress.loss,
                    "memory_bytes": memory,
                }
                write_json(directory.progress_file, status)
                last_write = time.monotonic()

        yield follow


def _record_group(
    workspace: Workspace,
    program: Program,
    group: Sequence[Lane],
    result: GroupResult,
    snapshots: Snapshots | None,
    recorded: set[str],
    directory: RunDirectory,
) -> None:
    """Writes what a finished group leaves; what a killed run had written already stays as it is."""
    config, reporter = workspace.config, workspace.reporter
    rule, rates = convergence_rule(config), workspace.learning_rates()
    reads, curves = [], []
    for lane, rows in zip(group, result.rows, strict=True):
        for read, steps in readings(config, lane):
            reads.append(read)
            curves.append([row for row in rows if row["step"] <= steps])
    if config.finetune.warm_start:
        for k, lane in enumerate(group):
            if set(lane.adapted) == {module for module, ranks in workspace.grids.items() if max(ranks)}:
                write_adapters(directory.probe_adapters(lane.name), best_adapters(program.engine, result, k, lane))
    if snapshots:
        curves = splice_probes(workspace, program, group, result, snapshots, reads, curves)
    _append_curves(directory, reads, curves)
    for record in lane_records(reads, curves, rule, rates):
        if record["lane"] not in recorded:
            append_jsonl(directory.lanes_file, record)
            recorded.add(record["lane"])
        if record["status"] == "diverged":
            reporter.warn(f"lane {record['lane']} diverged: {record['reason']}")
    directory.append_event(
        "group",
        lanes=[lane.name for lane in group],
        steps=[rows[-1]["step"] for rows in result.rows],
        useful_lane_steps=result.useful_steps,
        executed_lane_steps=result.executed_steps,
    )


def _append_curves(directory: RunDirectory, lanes: Sequence[Lane], curves: Sequence[Sequence[Row]]) -> None:
    """Adds the looks of lanes, but for those that a killed run had got to."""
    known = Counter(record["lane"] for record in read_jsonl(directory.curves_file, lambda text: None))
    for lane, rows in zip(lanes, curves, strict=True):
        for row in rows[known[lane.name] :]:
            append_jsonl(directory.curves_file, {"lane": lane.name, **row})
