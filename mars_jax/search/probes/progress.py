"""Progress of the probe phase for people and for progress.json."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import numpy as np

from mars_jax.job.directory import RunDirectory, memory_bytes
from mars_jax.job.workspace import Workspace
from mars_jax.lanes.result import Progress
from mars_jax.runtime.jsonfiles import write_json
from mars_jax.runtime.progress import Advance


@contextmanager
def following(
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
