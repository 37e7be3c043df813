"""How far a run is, read from its directory. It imports nothing heavy: `mars status` must answer at once."""

from collections.abc import Callable

from mars_jax.errors import ConfigError
from mars_jax.job import files
from mars_jax.job.directory import RunDirectory
from mars_jax.runtime.jsonfiles import Document, read_json, read_jsonl

_EVENTS_SHOWN = 5


def run_status(run: RunDirectory, warn: Callable[[str], None]) -> Document:
    """Phases, lanes done and planned, the process at work, and the last events.

    Args:
        run: the directory.
        warn: called with anything odd in the files.

    Raises:
        ConfigError: there is no run here.
        DataError: a file of the run isn't what its writer left.
    """
    if not (run / files.STATE).exists():
        raise ConfigError(f"there is no run in {run.path}. Start one with `mars run CONFIG`, or give its directory.")
    holder = run.holder()
    phases = {}
    for name, record in run.book.state()["phases"].items():
        # A killed process can't close its phase.
        killed = record["status"] == "running" and holder is None
        shown = {key: value for key, value in record.items() if key not in ("inputs_hash", "finished")}
        phases[name] = {**shown, "status": "interrupted"} if killed else shown
    progress = run / files.PROGRESS
    return {
        "run_dir": run.path,
        "process": holder,
        "phases": phases,
        "lanes_done": len(read_jsonl(run / files.LANES, warn)),
        "progress": read_json(progress) if holder and progress.exists() else None,
        "lanes_planned": read_json(run / files.PLAN)["lanes"] if (run / files.PLAN).exists() else None,
        "last_events": read_jsonl(run / files.EVENTS, warn)[-_EVENTS_SHOWN:],
    }
