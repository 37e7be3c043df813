"""Records of lanes and the curves that they were made from: compared, and the records made again where they are lost.

events.jsonl has the groups that ran to their end, curves.jsonl their eval points; lanes.jsonl follows from both.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from mars_jax.errors import DataError
from mars_jax.job import files
from mars_jax.job.job import Job
from mars_jax.lanes.eval_points import EvalPoint
from mars_jax.lanes.lane import Lane
from mars_jax.laws.records import LaneRecord, read_records
from mars_jax.runtime.jsonfiles import append_jsonl, dump_json, write_text
from mars_jax.runtime.text import first_of
from mars_jax.search.probes.design import planned_lanes, prefixes, run_of
from mars_jax.search.probes.records import convergence_rule, lane_records
from mars_jax.search.probes.run import probe_schedule


def recover_lanes(job: Job) -> None:
    """Adds the records of groups whose curves are whole: a run may have ended before it wrote them."""
    there = {record["lane"] for record in job.directory.lines(files.LANES, job.reporter.warn)}
    for record in _derived(job):
        if record.lane not in there:
            append_jsonl(job.directory / files.LANES, record.to_json())


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


def check_lanes(job: Job) -> None:
    """Refuses records that aren't those of the planned lanes and of their curves.

    Raises:
        DataError: a lane is missing, recorded twice or not planned, or its record differs from its curve.
    """
    path = job.directory / files.LANES
    records = read_records(job.directory.lines(files.LANES, job.reporter.warn))
    planned = [prefix.name for lane in planned_lanes(job.config) for prefix, _ in prefixes(job.config, lane)]
    count = Counter(record.lane for record in records)
    remedy = f"Delete {path}: the same command writes it again from {files.CURVES}."
    for what, names in (
        ("lacks the planned", [name for name in planned if not count[name]]),
        ("has records of unplanned", [name for name in count if name not in planned]),
        ("has more than one record of", [name for name, number in count.items() if number > 1]),
    ):
        if names:
            raise DataError(f"{path} {what} lanes: {first_of(names)}. {remedy}")
    derived = {record.lane: record.to_json() for record in _derived(job)}
    for record in records:
        expected = derived.get(record.lane)
        found = record.to_json()
        if expected and dump_json(expected) != dump_json(found):
            keys = [key for key in expected if dump_json(expected[key]) != dump_json(found.get(key))]
            raise DataError(
                f"{path}: the {keys[0]} of lane {record.lane} is {found.get(keys[0])}, but its curve in {files.CURVES} "
                f"gives {expected[keys[0]]}. {remedy}"
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
    config, directory = job.config, job.directory
    planned = {lane.name: lane for lane in planned_lanes(config)}
    curves: dict[str, list[EvalPoint]] = {}
    for document in directory.lines(files.CURVES, lambda text: None):
        curves.setdefault(document["lane"], []).append(EvalPoint.from_json(document))
    eval_steps = probe_schedule(config, job.base.model_config.text.vocab_size).eval_steps
    records: dict[str, LaneRecord] = {}
    for event in directory.lines(files.EVENTS, lambda text: None):
        names = event.get("lanes", [])
        if event["event"] != "group" or any(name not in planned for name in names):
            continue
        lanes: list[Lane] = []
        points: list[list[EvalPoint]] = []
        whole = True
        for name, last in zip(names, event["steps"], strict=True):
            for prefix, steps in prefixes(config, planned[name]):
                found = curves.get(prefix.name, [])
                expected = [step for step in eval_steps if step <= min(steps, last)]
                whole &= [point.step for point in found] == expected
                lanes.append(prefix)
                points.append(found)
        if whole and lanes:
            runs = [run_of(config, lane) for lane in lanes]
            made = lane_records(lanes, points, convergence_rule(config), config.learning_rates(), runs)
            records.update((record.lane, record) for record in made)
    order = {name: place for place, name in enumerate(curves)}
    return sorted(records.values(), key=lambda record: order[record.lane])
