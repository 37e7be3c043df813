"""Records of lanes and the curves that they were made from: compared, and the records made again where they are lost.

events.jsonl has the groups that ran to their end, curves.jsonl their eval points; lanes.jsonl follows from both.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from mars_jax.errors import DataError
from mars_jax.job import files
from mars_jax.job.job import Job
from mars_jax.lanes.eval_points import EvalPoint
from mars_jax.lanes.lane import Lane
from mars_jax.laws.records import LaneRecord
from mars_jax.runtime.jsonfiles import append_jsonl, dump_json, write_text
from mars_jax.runtime.text import first_of
from mars_jax.search.probes.design import planned_lanes, prefixes, run_of
from mars_jax.search.probes.records import convergence_rule, lane_records
from mars_jax.search.probes.run import probe_schedule, recorded_probes


def recover_lanes(job: Job) -> Mapping[str, LaneRecord]:
    """Adds the records of groups whose curves are whole: a run may have ended before it wrote them.

    Returns:
        Lane -> the record that follows from its curve, of all these groups.
    """
    there = {record["lane"] for record in job.directory.lines(files.LANES, job.reporter.warn)}
    derived = {record.lane: record for record in _derived(job)}
    missing = [record.to_json() for name, record in derived.items() if name not in there]
    if missing:
        append_jsonl(job.directory / files.LANES, *missing)
    return derived


def restore_lanes(job: Job, damaged: Sequence[Path]) -> bool:
    """Writes lanes.jsonl again as it was, if that alone is damaged.

    Args:
        job: of the run.
        damaged: files of the finished phase that are gone or hold something else.

    Returns:
        Whether it could; not where the lanes and their curves are gone, so that all of them run again.

    Raises:
        DataError: what is left is damaged, and would stay if lanes ran again.
    """
    directory = job.directory
    if not any((directory / file).exists() for file in (files.LANES, files.CURVES)):
        return False
    if list(damaged) == [files.LANES]:
        text = "".join(dump_json(record.to_json()) + "\n" for record in _derived(job))
        left = directory.book.phases()["probe"]["outputs"][files.LANES.as_posix()]
        if hashlib.sha256(text.encode()).hexdigest() == left["sha256"]:
            write_text(directory / files.LANES, text)
            return True
    names = first_of([str(directory / file) for file in damaged])
    raise DataError(
        f"the probes are finished, but {names} isn't what they left: damaged, deleted or changed by hand. Put it back "
        f"from a copy; or delete {directory / files.LANES} and {directory / files.CURVES}, and all lanes run again."
    )


def check_lanes(job: Job, derived: Mapping[str, LaneRecord]) -> None:
    """Refuses records that aren't those of the planned lanes and of their curves.

    Args:
        job: of the run.
        derived: lane -> the record that follows from its curve.

    Raises:
        DataError: a lane is missing, recorded twice or not planned, or its record differs from its curve.
    """
    path = job.directory / files.LANES
    records = {record.lane: record for record in recorded_probes(job)}
    planned = [prefix.name for lane in planned_lanes(job.config) for prefix, _ in prefixes(job.config, lane)]
    remedy = f"Delete {path}: the same command writes it again from {files.CURVES}."
    for what, names in (
        ("lacks the planned", [name for name in planned if name not in records]),
        ("has records of unplanned", [name for name in records if name not in planned]),
    ):
        if names:
            raise DataError(f"{path} {what} lanes: {first_of(names)}. {remedy}")
    for name, record in derived.items():
        expected, found = record.to_json(), records[name].to_json()
        keys = [key for key in expected if dump_json(expected[key]) != dump_json(found.get(key))]
        if keys:
            raise DataError(
                f"{path}: the {keys[0]} of lane {name} is {found.get(keys[0])}, but its curve in {files.CURVES} gives "
                f"{expected[keys[0]]}. {remedy}"
            )


def warn_of_missing_lanes(job: Job) -> None:
    """Warns where fewer lanes are recorded than plan.json lists: the laws are then fitted to those."""
    if not (job.directory / files.PLAN).exists():
        return
    planned = job.directory.read(files.PLAN)["lanes"]
    there = len(job.directory.lines(files.LANES, lambda text: None))
    if there < planned:
        job.reporter.warn(f"fit: {there} of the {planned} planned lanes are recorded; the laws are fitted to these")


def _derived(job: Job) -> list[LaneRecord]:
    """Records of the lanes of finished groups, in the order of their curves, as they were first made."""
    config = job.config
    curves: dict[str, list[EvalPoint]] = {}
    for document in job.directory.lines(files.CURVES, lambda text: None):
        curves.setdefault(document["lane"], []).append(EvalPoint.from_json(document))
    eval_steps = probe_schedule(config, job.base.model_config.text.vocab_size).eval_steps
    records: dict[str, LaneRecord] = {}
    for group in _finished_groups(job):
        lanes = [lane for lane, _ in group]
        points = [curves.get(lane.name, []) for lane in lanes]
        expected = [[step for step in eval_steps if step <= last] for _, last in group]
        if [[point.step for point in of_lane] for of_lane in points] == expected:
            runs = [run_of(config, lane) for lane in lanes]
            made = lane_records(lanes, points, convergence_rule(config), config.learning_rates(), runs)
            records.update((record.lane, record) for record in made)
    order = {name: place for place, name in enumerate(curves)}
    return sorted(records.values(), key=lambda record: order[record.lane])


def _finished_groups(job: Job) -> Iterator[list[tuple[Lane, int]]]:
    """What was read off each finished group of planned lanes: the lanes, and the last step of each."""
    planned = {lane.name: lane for lane in planned_lanes(job.config)}
    for event in job.directory.lines(files.EVENTS, lambda text: None):
        if event["event"] == "group" and all(name in planned for name in event["lanes"]):
            yield [
                (prefix, min(steps, last))
                for name, last in zip(event["lanes"], event["steps"], strict=True)
                for prefix, steps in prefixes(job.config, planned[name])
            ]
