"""The probe phase: which lanes a config asks for, what they cost, and running them in groups that survive a kill.

The compiled part is `lanes.engine`, the loop over one group `lanes.loop`; the laws come after.
"""

import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from mars_jax.adapters.files import write_adapters
from mars_jax.job.checks import check_sizes
from mars_jax.job.directory import RunDirectory
from mars_jax.job.programs import Program
from mars_jax.job.workspace import Workspace
from mars_jax.lanes.lane import Lane
from mars_jax.lanes.loop import run_group
from mars_jax.lanes.losses import Adapters, losses_of
from mars_jax.lanes.result import GroupResult, Rates, Row, best_adapters
from mars_jax.lanes.schedule import Schedule, look_steps, warmup_multipliers
from mars_jax.lanes.snapshots import Snapshots
from mars_jax.lanes.stopping import Leaving, ceiling_of
from mars_jax.runtime.checkpoint import Checkpoints
from mars_jax.runtime.interrupts import Interrupts
from mars_jax.runtime.jsonfiles import append_jsonl, read_jsonl
from mars_jax.search.probes.design import readings
from mars_jax.search.probes.progress import following
from mars_jax.search.probes.records import convergence_rule, lane_records
from mars_jax.search.probes.swaps import Reading, count_hybrids, parties, remaining_losses

# Beside the checkpoints of a group.
SNAPSHOTS = "adapters.f32"


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
    with Interrupts() as interrupts, following(workspace, len(lanes), done_before, directory) as follow:
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
