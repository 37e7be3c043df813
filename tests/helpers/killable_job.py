"""A tiny job for commands that are to be stopped: real processes, started, watched and signalled."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tests.helpers import tiny_job

# Lanes, in two groups, and the steps of each.
LANES, STEPS = 12, 16
PROBES = ("probes/lanes.jsonl", "probes/curves.jsonl")
RESULTS = (
    *PROBES,
    "laws.json",
    "selection.json",
    "sweep/runs.json",
    "finetune/metrics.jsonl",
    "finetune/adapters.safetensors",
)


@dataclass(frozen=True)
class Job:
    """Checkpoint and data of the job, in one folder, and a run that nobody stopped; other runs may lie anywhere."""

    folder: Path
    rule: str = "drift"

    @property
    def alone(self) -> Path:
        """The run that nobody stopped."""
        return self.folder / "run"

    def config(self, run: Path) -> Path:
        return tiny_job.config(
            run.with_suffix(".yaml"),
            self.folder / "base",
            self.folder / "data" / "train.json",
            run,
            probe={"num_samples": [8, 16], "chunk_steps": 2},
            finetune={"warm_start": True},
            evaluate={"controls": False},
            convergence={"rule": self.rule},
        )

    def start(self, command: str, run: Path, before: str = "") -> subprocess.Popen[str]:
        """A `mars` process with --json; `before` is Python for it to begin with."""
        # One folder of compiled programs for the whole test session.
        environment = tiny_job.environment(Path(os.environ["JAX_COMPILATION_CACHE_DIR"]))
        arguments = tiny_job.command(command, self.config(run), "--json")
        arguments[2] = before + arguments[2]
        return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)

    def end(self, command: str, run: Path, before: str = "") -> tuple[int, str, str]:
        """Exit code, stdout and stderr of a process that nobody stops."""
        process = self.start(command, run, before)
        out, err = process.communicate(timeout=300)
        return process.returncode, out, err

    def stop(self, command: str, run: Path, number: signal.Signals, before: str = "") -> tuple[int, str, str]:
        """The same of one that is sent a signal once lanes run in it."""
        progress = run / "progress.json"
        progress.unlink(missing_ok=True)
        process = self.start(command, run, before)
        wait_for(process, progress.exists)
        process.send_signal(number)
        out, err = process.communicate(timeout=100)
        return process.returncode, out, err


@cache
def make(place: Path, rule: str = "drift") -> Job:
    """The job, made and run once for all tests of a session, which have one place for temporary files."""
    job = Job(place / f"killable_job-{rule}", rule)
    tiny_job.checkpoint(job.folder / "base")
    tiny_job.records(job.folder / "data", 60)
    code, _, err = job.end("run", job.alone)
    assert code == 0, err
    assert len(lines(job.alone / "probes" / "lanes.jsonl")) == LANES
    return job


def wait_for(process: subprocess.Popen[str], reached: Callable[[], bool]) -> None:
    """Waits while a process is at work."""
    limit = time.monotonic() + 200
    while not reached():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < limit
        time.sleep(0.002)


def lines(path: Path) -> list[str]:
    """The lines of a file, none if it is absent."""
    return path.read_text().splitlines() if path.exists() else []


def assert_ends_alike(job: Job, command: str, run: Path) -> None:
    """Runs the command to its end, which must be that of the run that nobody stopped."""
    code, _, err = job.end(command, run)
    assert code == 0, err
    assert_alike(job, command, run)


def assert_alike(job: Job, command: str, run: Path) -> None:
    """Compares what a command left, byte for byte."""
    for name in {"run": RESULTS, "probe": PROBES}[command]:
        assert (run / name).read_bytes() == (job.alone / name).read_bytes(), name


def error_of(out: str, err: str) -> str:
    """The message of a command that failed, which is the same on both streams."""
    message = str(json.loads(out)["error"]["message"])
    assert err.endswith(f"mars: {message}\n")
    return message
