"""The run directory: where each file of a run lies, which phases are done, and who may write.

One process at a time holds a run directory open; others may read it. What the files of a phase hold is the phase's
own business; this file only knows their places. It imports nothing heavy: `mars status` must answer at once.
"""

import fcntl
import hashlib
import importlib.metadata
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from mars_jax.config.load import RESOLVED_CONFIG, Config
from mars_jax.errors import ConfigError
from mars_jax.runtime.jsonfiles import append_jsonl, read_json, read_jsonl, write_json, write_text

_LOCK = "lock"
_PACKAGES = ("mars_jax", "jax", "flax", "optax", "transformers")
_EVENTS_SHOWN = 5


@dataclass(frozen=True)
class RunDirectory:
    """A run directory. Made directly it can be read; a run that writes takes it from `RunDirectory.open`.

    Attributes:
        path: the directory.
    """

    path: Path

    @classmethod
    @contextmanager
    def open(cls, config: Config) -> Iterator["RunDirectory"]:
        """Makes or re-opens `config.run_dir` and holds it, for this process alone, until the block ends.

        Raises:
            ConfigError: the directory can't be written, is held by another process, holds something that isn't a
                run, or was made with another config.
        """
        run = cls(config.run_dir)
        try:
            run.path.mkdir(parents=True, exist_ok=True)
            run._check_ours()
            lock = (run.path / _LOCK).open("a+")
        except OSError as error:
            raise run._cannot_write(error) from None
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(
                    f"run directory {run.path} is in use by process {run.holder() or '(unknown)'}. "
                    "Wait for it, stop it, or set another run_dir."
                ) from None
            lock.truncate(0)
            lock.write(str(os.getpid()))
            lock.flush()
            try:
                run._check_config(config)
                write_json(run.state_file, {**run.state(), "versions": _versions()})
                run.append_event("opened")
            except PermissionError as error:
                raise run._cannot_write(error) from None
            yield run

    # Places. Folders are made by whoever writes into them first; `write_json` and `append_jsonl` do so.

    @property
    def config_file(self) -> Path:
        """All settings of the run."""
        return self.path / RESOLVED_CONFIG

    @property
    def state_file(self) -> Path:
        """Phases, versions and peak memory."""
        return self.path / "state.json"

    @property
    def events_file(self) -> Path:
        """What happened, one line an event."""
        return self.path / "events.jsonl"

    @property
    def data_file(self) -> Path:
        """Counts of samples, and those dropped, by name."""
        return self.path / "data.json"

    @property
    def plan_file(self) -> Path:
        """The lanes to run and what they cost."""
        return self.path / "plan.json"

    @property
    def lanes_file(self) -> Path:
        """One record a finished lane."""
        return self.path / "probes" / "lanes.jsonl"

    @property
    def curves_file(self) -> Path:
        """One record a lane and look."""
        return self.path / "probes" / "curves.jsonl"

    @property
    def progress_file(self) -> Path:
        """How the running phase stands: lanes done, running and queued, steps, loss, memory."""
        return self.path / "progress.json"

    @property
    def lane_block_file(self) -> Path:
        """How many lanes run in one step, where that was measured."""
        return self.path / "probes" / "lane_block.json"

    def probe_adapters(self, lane: str) -> Path:
        """The best adapters of a probe, kept where the final run may start from them."""
        return self.path / "probes" / "adapters" / f"{lane}.safetensors"

    @property
    def probe_checkpoints(self) -> Path:
        """State of the probes in progress."""
        return self.path / "probes" / "checkpoints"

    @property
    def laws_file(self) -> Path:
        """Both fitted laws."""
        return self.path / "laws.json"

    @property
    def selection_file(self) -> Path:
        """The pick and all candidates."""
        return self.path / "selection.json"

    @property
    def sweep_file(self) -> Path:
        """The curves of the local sweep's final runs."""
        return self.path / "sweep" / "runs.json"

    @property
    def sweep_checkpoints(self) -> Path:
        """State of the local sweep."""
        return self.path / "sweep" / "checkpoints"

    @property
    def finetune_metrics_file(self) -> Path:
        """One record a look of the final run."""
        return self.path / "finetune" / "metrics.jsonl"

    @property
    def finetune_adapters_file(self) -> Path:
        """The adapters at the best validation loss of the final run."""
        return self.path / "finetune" / "adapters.safetensors"

    @property
    def finetune_summary_file(self) -> Path:
        """The outcome of the final run."""
        return self.path / "finetune" / "summary.json"

    @property
    def finetune_checkpoints(self) -> Path:
        """State of the final run."""
        return self.path / "finetune" / "checkpoints"

    @property
    def trials_file(self) -> Path:
        """One record a final run of the comparison."""
        return self.path / "compare" / "trials.jsonl"

    @property
    def comparison_checkpoints(self) -> Path:
        """State of the comparison's runs in progress."""
        return self.path / "compare" / "checkpoints"

    @property
    def comparison_file(self) -> Path:
        """The pick beside its alternatives."""
        return self.path / "compare.json"

    @property
    def evaluation_file(self) -> Path:
        """Measurements on the test samples."""
        return self.path / "evaluation.json"

    @property
    def samples_file(self) -> Path:
        """One record a test sample."""
        return self.path / "samples.jsonl"

    @property
    def adapter(self) -> Path:
        """The PEFT adapter."""
        return self.path / "adapter"

    @property
    def merged(self) -> Path:
        """The whole checkpoint with the adapters added."""
        return self.path / "merged"

    @property
    def report(self) -> Path:
        """The page, its figures and report.json."""
        return self.path / "report"

    # State.

    def state(self) -> dict[str, Any]:
        """`{"phases": {name: {"status", "inputs_hash", "started", "finished", "seconds", "error"}}, "versions": {...},
        "peak_memory_bytes": n}`: times in UTC, seconds summed over attempts at the same inputs."""
        return {"phases": {}} if not self.state_file.exists() else read_json(self.state_file)

    def is_done(self, phase: str, inputs_hash: str) -> bool:
        """Whether the phase was finished from these very inputs (see `hash_inputs`)."""
        record = self.state()["phases"].get(phase, {})
        return record.get("status") == "done" and record.get("inputs_hash") == inputs_hash

    @contextmanager
    def phase(self, name: str, inputs_hash: str) -> Iterator[None]:
        """Keeps the books of a phase while the block runs: running, then done, failed or interrupted."""
        earlier = self.state()["phases"].get(name, {})
        resumed = earlier.get("inputs_hash") == inputs_hash and earlier.get("status") != "done"
        earlier_seconds = earlier.get("seconds", 0.0) if resumed else 0.0
        record = {"status": "running", "inputs_hash": inputs_hash, "started": _now(), "seconds": earlier_seconds}
        self._write_phase(name, record)
        start = time.monotonic()

        def close(status: str, **more: str) -> None:
            seconds = round(earlier_seconds + time.monotonic() - start, 3)
            self._write_phase(name, {**record, "status": status, "finished": _now(), "seconds": seconds, **more})

        try:
            yield
        except KeyboardInterrupt:
            close("interrupted")
            raise
        except BaseException as error:
            close("failed", error=f"{type(error).__name__}: {error}")
            raise
        close("done")

    def append_event(self, event: str, **fields: Any) -> None:
        """Adds a line `{"time", "event", ...fields}` to events.jsonl."""
        append_jsonl(self.events_file, {"time": _now(), "event": event, **fields})

    def holder(self) -> int | None:
        """The id of the process that holds the directory open, if one does."""
        try:
            with (self.path / _LOCK).open() as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    return int(lock.read() or 0) or None
        except FileNotFoundError:
            pass
        return None

    def status(self, warn: Callable[[str], None]) -> dict[str, Any]:
        """How far the run is: phases, lanes done and planned, the process at work, and the last events.

        Args:
            warn: told of anything odd in the files.

        Raises:
            ConfigError: there is no run here.
            DataError: a file of the run isn't what its writer left.
        """
        if not self.state_file.exists():
            raise ConfigError(
                f"there is no run in {self.path}. Start one with `mars run CONFIG`, or give its directory."
            )
        holder = self.holder()
        phases = {}
        for name, record in self.state()["phases"].items():
            # A killed process can't close its phase.
            killed = record["status"] == "running" and holder is None
            shown = {key: value for key, value in record.items() if key not in ("inputs_hash", "finished")}
            phases[name] = {**shown, "status": "interrupted"} if killed else shown
        return {
            "run_dir": self.path,
            "process": holder,
            "phases": phases,
            "lanes_done": len(read_jsonl(self.lanes_file, warn)),
            "progress": read_json(self.progress_file) if holder and self.progress_file.exists() else None,
            "lanes_planned": read_json(self.plan_file)["lanes"] if self.plan_file.exists() else None,
            "last_events": read_jsonl(self.events_file, warn)[-_EVENTS_SHOWN:],
        }

    def _cannot_write(self, error: OSError) -> ConfigError:
        return ConfigError(
            f"can't write the run directory {self.path}: {error.strerror}. Set run_dir to a folder that you can write."
        )

    def _check_ours(self) -> None:
        """Refuses to write between the files of something else."""
        names = {entry.name for entry in self.path.iterdir()}
        # A first opening that was killed leaves a lock, and perhaps a config half written under another name.
        foreign = [name for name in names if name != _LOCK and not name.startswith(RESOLVED_CONFIG)]
        if RESOLVED_CONFIG not in names and foreign:
            raise ConfigError(
                f"{self.path} holds files but no {RESOLVED_CONFIG}, so it isn't a run directory. "
                "Set run_dir to a new folder."
            )

    def _check_config(self, config: Config) -> None:
        if not self.config_file.exists():
            write_text(self.config_file, config.resolved_yaml())
            return
        there = _flatten(yaml.safe_load(self.config_file.read_text(encoding="utf-8")))
        here = _flatten(yaml.safe_load(config.resolved_yaml()))
        lines = [
            f"  {key}: {there.get(key, '(absent)')} -> {here.get(key, '(absent)')}"
            for key in dict.fromkeys([*there, *here])
            # A run directory may be moved.
            if key != "run_dir" and there.get(key, "(absent)") != here.get(key, "(absent)")
        ]
        if lines:
            raise ConfigError(
                "\n".join([f"run directory {self.path} was made with another config (there -> here):", *lines])
                + f"\nSet another run_dir, take the settings back, or delete {self.path} to start again."
            )

    def _write_phase(self, name: str, record: Mapping[str, Any]) -> None:
        state = self.state()
        peak = max(state.get("peak_memory_bytes", 0), peak_memory_bytes())
        write_json(self.state_file, {**state, "phases": {**state["phases"], name: record}, "peak_memory_bytes": peak})
        self.append_event("phase", phase=name, status=record["status"])


def hash_inputs(*inputs: Path | str) -> str:
    """SHA-256 of what a phase starts from: files by their content, texts (such as a config section) as they are."""
    digest = hashlib.sha256()
    for item in inputs:
        content = item.read_bytes() if isinstance(item, Path) else item.encode()
        digest.update(len(content).to_bytes(8, "big") + content)
    return digest.hexdigest()


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {prefix: value}
    return {
        path: leaf
        for key, item in value.items()
        for path, leaf in _flatten(item, f"{prefix}.{key}" if prefix else str(key)).items()
    }


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in _PACKAGES}}


def peak_memory_bytes() -> int:
    """Most memory this process has had resident; the kernel counts in KiB on Linux and in bytes on macOS."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def memory_bytes() -> int:
    """Memory that this process has resident now, where the system tells; else the most that it ever had."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return peak_memory_bytes()
    return pages * os.sysconf("SC_PAGE_SIZE")


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
