"""How far a run is, read from its directory. It imports nothing heavy: `mars status` must answer at once."""

from collections.abc import Callable

from mars_jax.errors import ConfigError
from mars_jax.job import files, lock
from mars_jax.job.directory import RunDirectory
from mars_jax.runtime.jsonfiles import Document

_EVENTS_SHOWN = 5
_SHOWN = ("status", "started", "seconds", "error")


def run_status(run: RunDirectory, warn: Callable[[str], None]) -> Document:
    """Phases, lanes done and planned, the process at work, and the last events.

    Args:
        run: the directory.
        warn: called with anything odd in the files.

    Raises:
        ConfigError: there is no run here.
        DataError: a file of the run isn't what its writer left.
    """
    run.check_links()
    if not (run / files.STATE).exists():
        raise ConfigError(f"there is no run in {run.path}. Start one with `mars run CONFIG`, or give its directory.")
    holder = lock.holder(run.path)
    phases, records = {}, run.book.phases()
    for name, record in records.items():
        # A killed process can't close its phase.
        killed = record["status"] == "running" and holder is None
        shown = {key: record[key] for key in _SHOWN if key in record}
        phases[name] = {**shown, "status": "interrupted"} if killed else shown
    for fault in (run.book.fault(file, records) for file in (files.PLAN, files.LANES)):
        if fault:
            warn(fault)
    return {
        "run_dir": run.path,
        "process": holder.process if holder else None,
        **({"machine": holder.machine} if holder and holder.machine else {}),
        "phases": phases,
        "lanes_done": len(run.lines(files.LANES, warn)),
        "progress": run.read(files.PROGRESS) if holder and (run / files.PROGRESS).exists() else None,
        "lanes_planned": run.read(files.PLAN)["lanes"] if (run / files.PLAN).exists() else None,
        "last_events": run.lines(files.EVENTS, warn)[-_EVENTS_SHOWN:],
    }
