"""The book of a run: which phases were finished from which inputs, and what happened when.

It is kept in state.json and events.jsonl. What a phase does is not its business.
"""

import hashlib
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from mars_jax.job import files
from mars_jax.runtime.jsonfiles import Document, append_jsonl, read_json, write_json
from mars_jax.runtime.process import peak_memory_bytes


@dataclass(frozen=True)
class Book:
    """The book of a run directory.

    Attributes:
        path: the run directory.
    """

    path: Path

    def state(self) -> Document:
        """`{"phases": {name: {"status", "inputs_hash", "started", "finished", "seconds", "error"}}, "versions": {...},
        "peak_memory_bytes": n}`: times in UTC, seconds summed over attempts at the same inputs."""
        file = self.path / files.STATE
        return read_json(file) if file.exists() else {"phases": {}}

    def seconds(self, phase: str) -> float:
        """Seconds that a phase took; 0 for one that never ran."""
        return self.state()["phases"].get(phase, {}).get("seconds", 0.0)

    def write_versions(self, versions: Mapping[str, str]) -> None:
        """Notes the versions that the run is continued with."""
        write_json(self.path / files.STATE, {**self.state(), "versions": dict(versions)})

    def is_done(self, phase: str, inputs_hash: str) -> bool:
        """Whether the phase was finished from these very inputs (see `hash_inputs`)."""
        record = self.state()["phases"].get(phase, {})
        return record.get("status") == "done" and record.get("inputs_hash") == inputs_hash

    @contextmanager
    def phase(self, name: str, inputs_hash: str) -> Iterator[None]:
        """Notes a phase while the block runs: running, then done, failed or interrupted."""
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

    def append_event(self, event: str, **fields: object) -> None:
        """Adds a line `{"time", "event", ...fields}` to events.jsonl."""
        append_jsonl(self.path / files.EVENTS, {"time": _now(), "event": event, **fields})

    def _write_phase(self, name: str, record: Mapping[str, object]) -> None:
        state = self.state()
        peak = max(state.get("peak_memory_bytes", 0), peak_memory_bytes())
        phases = {**state["phases"], name: record}
        write_json(self.path / files.STATE, {**state, "phases": phases, "peak_memory_bytes": peak})
        self.append_event("phase", phase=name, status=record["status"])


def hash_inputs(*inputs: Path | str) -> str:
    """SHA-256 of what a phase starts from: files by their content, texts (such as a config section) as they are."""
    digest = hashlib.sha256()
    for item in inputs:
        content = item.read_bytes() if isinstance(item, Path) else item.encode()
        digest.update(len(content).to_bytes(8, "big") + content)
    return digest.hexdigest()


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
