"""Progress of the probe phase, for people and for progress.json."""

import math
import time
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Self

from mars_jax.job import files
from mars_jax.job.job import Job
from mars_jax.lanes.result import Progress
from mars_jax.runtime.jsonfiles import write_json
from mars_jax.runtime.process import memory_bytes
from mars_jax.runtime.progress import Advance


class ProbeProgress:
    """Reports how the phase stands: lanes done, running, queued, steps, loss, memory. A context manager."""

    def __init__(self, job: Job, lanes: int, done_before: int) -> None:
        """Of some number of lanes in all, of which earlier runs of the command had finished `done_before`."""
        self._job = job
        self._lanes = lanes
        self._horizon = job.config.probe.horizon
        self._lanes_done = done_before
        self._steps = done_before * self._horizon
        self._last_write = 0.0
        self._bar: AbstractContextManager[Advance] | None = None
        self._advance: Advance | None = None

    def report(self, size: int, progress: Progress) -> None:
        """Takes the progress of a group of `size` lanes."""
        self._steps += progress.lane_steps
        running = progress.running if progress.step < self._horizon else 0
        done = self._lanes_done + size - running
        counts = {"done": done, "running": running, "queued": self._lanes - self._lanes_done - size}
        if not running:
            self._lanes_done += size
        memory = memory_bytes()
        total = self._lanes * self._horizon
        if self._advance is None:
            # What a killed run had done comes first: it took no time of this one.
            self._bar = self._job.reporter.progress("probe", total, "lane-steps", done=self._steps)
            self._advance = self._bar.__enter__()
        else:
            lanes = ", ".join(f"{number} {name}" for name, number in counts.items())
            loss = "" if math.isnan(progress.loss) else f", loss {progress.loss:.3f}"
            detail = f"lanes {lanes}; step {progress.step}{loss}, {memory / 2**30:.1f} GiB"
            self._advance(progress.lane_steps, detail)
        if time.monotonic() - self._last_write > 1.0 or not running:
            status = {
                "phase": "probe",
                "lanes": counts,
                "step": progress.step,
                "lane_steps": {"done": self._steps, "total": total},
                "validation_loss": progress.loss,
                "memory_bytes": memory,
            }
            write_json(self._job.directory / files.PROGRESS, status, synced=False)
            self._last_write = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.__exit__(kind, error, trace)
