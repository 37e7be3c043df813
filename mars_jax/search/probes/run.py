"""Runs the probes in groups that survive a kill, and writes what each lane came to."""

import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

from mars_jax.adapters.files import write_adapters
from mars_jax.config.load import Config
from mars_jax.errors import DataError
from mars_jax.job import files
from mars_jax.job.checks import check_sizes
from mars_jax.job.directory import RunDirectory
from mars_jax.job.job import Job
from mars_jax.job.programs import Program
from mars_jax.lanes.engine import Engine
from mars_jax.lanes.eval_points import EvalPoint, Points
from mars_jax.lanes.inputs import Hooks
from mars_jax.lanes.lane import Lane
from mars_jax.lanes.loop import run_group
from mars_jax.lanes.losses import Adapters, losses_of
from mars_jax.lanes.result import GroupResult, best_adapters
from mars_jax.lanes.schedule import Schedule, eval_steps, warmup_multipliers
from mars_jax.lanes.snapshots import Snapshots
from mars_jax.lanes.stopping import Patience, loss_ceiling
from mars_jax.laws.records import LaneRecord, read_records
from mars_jax.runtime.checkpoint import Checkpoints
from mars_jax.runtime.durable import sync_tree
from mars_jax.runtime.interrupts import Interrupts
from mars_jax.runtime.jsonfiles import append_jsonl
from mars_jax.runtime.text import first_of
from mars_jax.search.probes.design import prefixes, run_of
from mars_jax.search.probes.progress import ProbeProgress
from mars_jax.search.probes.records import convergence_rule, lane_records
from mars_jax.search.probes.swaps import Prefix, count_swaps, module_swaps, swap_groups

# Beside the checkpoints of a group.
SNAPSHOTS = "adapters.f32"


def probe_schedule(config: Config, vocabulary: int) -> Schedule:
    """Steps and eval points of every probe.

    Args:
        config: of the job.
        vocabulary: tokens of the model.
    """
    settings = config.probe
    return Schedule(
        warmup_multipliers(settings.horizon, config.optimizer.warmup_steps, "constant"),
        eval_steps(settings.horizon, settings.looks_per_doubling),
        settings.looks_per_doubling,
        settings.chunk_steps,
        Patience(settings.patience),
        loss_ceiling(vocabulary),
        averaging=settings.averaging,
    )


def needs_swaps(config: Config) -> bool:
    """Whether the config's convergence rule reads module swaps."""
    rule = convergence_rule(config)
    return rule is not None and rule.rule.needs_swaps


def recorded_probes(job: Job) -> list[LaneRecord]:
    """Records of the lanes that are finished.

    Raises:
        DataError: a lane is recorded twice, or a record isn't one.
    """
    records = read_records(job.directory.lines(files.LANES, job.reporter.warn))
    twice = [name for name, number in Counter(record.lane for record in records).items() if number > 1]
    if twice:
        raise DataError(
            f"{job.directory / files.LANES} has more than one record of lanes: {first_of(twice)}. Keep one line of "
            "each."
        )
    return records


def run_probes(job: Job, lanes: Sequence[Lane], programs: Sequence[Program]) -> Mapping[str, LaneRecord]:
    """Runs lanes in the groups of their programs; a finished group is never run again.

    Returns:
        Lane -> its record, of the groups that ran.
    """
    config, directory = job.config, job.directory
    check_sizes(config, len(job.data.search.train))
    schedule = probe_schedule(config, job.base.model_config.text.vocab_size)
    recorded = {record["lane"] for record in directory.lines(files.LANES, job.reporter.warn)}
    num_points = recorded_points(directory)
    checkpoint_folder = directory / files.PROBE_CHECKPOINTS
    remaining = []
    made: dict[str, LaneRecord] = {}
    for program in programs:
        for group in program.groups:
            if all(prefix.name in recorded for lane in group for prefix, _ in prefixes(config, lane)):
                # Left there if a run was killed after the last record.
                shutil.rmtree(checkpoint_folder / group[0].name, ignore_errors=True)
            else:
                remaining.append((program, group))
    done_before = len(lanes) - sum(len(group) for _, group in remaining)
    with Interrupts() as interrupts, ProbeProgress(job, len(lanes), done_before) as progress:
        for program, group in remaining:
            folder = checkpoint_folder / group[0].name
            with ExitStack() as stack:
                checkpoints = stack.enter_context(Checkpoints(folder, job.reporter.warn))
                snapshots = None
                if needs_swaps(config):
                    size = program.engine.layout.size
                    file = Snapshots(folder / SNAPSHOTS, schedule.eval_steps, len(group), size)
                    snapshots = stack.enter_context(file)
                inputs = job.inputs.probes(group[0], program.engine)
                hooks = Hooks(checkpoints, snapshots, interrupts, partial(progress.report, len(group)))
                result = run_group(group, program.engine, inputs, schedule, hooks)
                records = _record_group(job, program.engine, group, result, snapshots, recorded, num_points)
                made.update((record.lane, record) for record in records)
            shutil.rmtree(folder)
    return made


def read_prefixes(
    config: Config, group: Sequence[Lane], result: GroupResult
) -> tuple[list[Lane], list[list[EvalPoint]]]:
    """The lanes that are read off a group, and the eval points of each."""
    lanes, curves = [], []
    for lane, points in zip(group, result.points, strict=True):
        for prefix, steps in prefixes(config, lane):
            lanes.append(prefix)
            curves.append([point for point in points if point.step <= steps])
    return lanes, curves


def with_module_swaps(
    job: Job, engine: Engine, group: Sequence[Lane], result: GroupResult, snapshots: Snapshots
) -> list[list[EvalPoint]]:
    """The eval points of what is read off a group, with module swaps; uses up the group's state.

    Args:
        job: of the run.
        engine: that ran the group.
        group: its lanes.
        result: what it left.
        snapshots: the adapters of its eval points.
    """
    config = job.config
    lanes, curves = read_prefixes(config, group, result)
    places = [k for k, lane in enumerate(group) for _ in prefixes(config, lane)]
    measured = [
        Prefix(k, swap_groups(lane.adapted, config.lora.searched), points)
        for k, lane, points in zip(places, lanes, curves, strict=True)
    ]
    inputs = job.inputs.probes(group[0], engine)
    with job.reporter.progress("module swaps", count_swaps(measured), "swaps") as advance:

        def losses(adapters: Iterable[Adapters]) -> list[float]:
            def followed() -> Iterator[Adapters]:
                for mixed in adapters:
                    yield mixed
                    advance(1, "")

            return losses_of(followed(), engine, result.state, inputs, chunk_steps=config.probe.chunk_steps)

        found = module_swaps(engine, result, snapshots, measured, losses)
    return [
        [replace(point, swaps=swaps) for point, swaps in zip(points, of_lane, strict=True)]
        for points, of_lane in zip(curves, found, strict=True)
    ]


def _record_group(
    job: Job,
    engine: Engine,
    group: Sequence[Lane],
    result: GroupResult,
    snapshots: Snapshots | None,
    recorded: set[str],
    num_points: Mapping[str, int],
) -> list[LaneRecord]:
    """Writes what a finished group leaves, and returns its records; what is there already stays.

    Args:
        job: of the run.
        engine: that ran the group.
        group: its lanes.
        result: what it left.
        snapshots: the adapters of its eval points, where module swaps are measured.
        recorded: names of lanes with a record; those of the group are added.
        num_points: lane -> eval points that a killed run had written of it.
    """
    config, directory = job.config, job.directory
    lanes, curves = read_prefixes(config, group, result)
    if config.finetune.warm_start:
        adapted = {module for module, ranks in config.lora.grids.items() if max(ranks)}
        for k, lane in enumerate(group):
            if set(lane.adapted) == adapted:
                file = directory / files.probe_adapters(lane.name)
                write_adapters(file, best_adapters(engine, result, k, lane))
    if snapshots:
        curves = with_module_swaps(job, engine, group, result, snapshots)
    directory.book.append_event(
        "group",
        lanes=[lane.name for lane in group],
        steps=[points[-1].step for points in result.points],
        useful_lane_steps=result.useful_steps,
        executed_lane_steps=result.executed_steps,
    )
    append_curves(directory, lanes, curves, num_points)
    runs = [run_of(config, lane) for lane in lanes]
    records = lane_records(lanes, curves, convergence_rule(config), config.learning_rates(), runs)
    for record in records:
        if record.lane not in recorded:
            append_jsonl(directory / files.LANES, record.to_json())
            recorded.add(record.lane)
        if record.status == "diverged":
            job.reporter.warn(f"lane {record.lane} diverged: {record.reason}")
    # Before the checkpoints that they were made from are removed.
    for written in (files.EVENTS, files.CURVES, files.LANES):
        sync_tree(directory / written)
    return records


def recorded_points(directory: RunDirectory) -> Mapping[str, int]:
    """Lane -> number of its eval points in curves.jsonl."""
    return Counter(point["lane"] for point in directory.lines(files.CURVES, lambda text: None))


def append_curves(
    directory: RunDirectory, lanes: Sequence[Lane], curves: Sequence[Points], num_points: Mapping[str, int]
) -> None:
    """Adds the eval points of lanes, but for those that a killed run had written: so many of each lane."""
    lines = [
        {"lane": lane.name, **point.to_json()}
        for lane, points in zip(lanes, curves, strict=True)
        for point in points[num_points.get(lane.name, 0) :]
    ]
    append_jsonl(directory / files.CURVES, *lines)
