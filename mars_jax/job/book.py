"""The book of a run: which phases were finished from which inputs, what they left, and what happened when.

It is kept in state.json and events.jsonl. What a phase does is not its business.
"""

import hashlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from mars_jax.config.load import RESOLVED_CONFIG
from mars_jax.errors import DataError
from mars_jax.job import files
from mars_jax.job.documents import State
from mars_jax.runtime.durable import content_of, sync
from mars_jax.runtime.jsonfiles import Document, append_jsonl, read_json, write_json
from mars_jax.runtime.process import peak_memory_bytes

Phases = Mapping[str, Document]
"""Phase -> its record in state.json: see `documents.PhaseRecord`."""


@dataclass(frozen=True)
class Book:
    """The book of a run directory.

    Attributes:
        path: the run directory.
    """

    path: Path

    def state(self) -> Document:
        """`{"phases": {name: {...}}, "versions": {...}, "peak_memory_bytes": n}`: see `documents.PhaseRecord`.

        Times are in UTC, seconds summed over attempts at the same inputs.
        """
        file = self.path / files.STATE
        return read_json(file, State) if file.exists() else {"phases": {}}

    def phases(self) -> Phases:
        """The records of all phases that ever ran."""
        found: Phases = self.state()["phases"]
        return found

    def seconds(self, phase: str) -> float:
        """Seconds that a phase took; 0 for one that never ran."""
        return self.phases().get(phase, {}).get("seconds", 0.0)

    def note(self, **values: object) -> None:
        """Notes what concerns no single phase, such as the versions that the run is continued with."""
        write_json(self.path / files.STATE, {**self.state(), **values})

    # What finished phases left.

    def damaged(self, record: Document) -> list[Path]:
        """Files that a finished phase left, by its record, and that are gone, or hold something else by now."""
        outputs = record.get("outputs") or {}
        return [Path(file) for file, left in outputs.items() if not self._is_intact(file, left)]

    def check(self, file: Path) -> None:
        """Refuses a file that isn't what the phase that made it left; what no phase of this run made is taken as it is.

        Args:
            file: relative to the run directory; or a folder, for all that is in it.

        Raises:
            DataError: it is gone or holds something else.
        """
        self.check_all([file], self.phases())

    def check_all(self, paths: Iterable[Path], phases: Phases) -> None:
        """Checks several files at one state of the book."""
        for path in paths:
            if fault := self.fault(path, phases):
                raise DataError(fault)

    def fault(self, file: Path, phases: Phases) -> str | None:
        """What `check` refuses a file for."""
        for phase, record in phases.items():
            outputs = (record.get("outputs") or {}) if record["status"] == "done" else {}
            for name in (name for name in outputs if Path(name).is_relative_to(file)):
                if not self._is_intact(name, outputs[name]):
                    state = "isn't what" if (self.path / name).exists() else "is gone, which"
                    return (
                        f"{self.path / name} {state} the phase {phase} left: it was damaged, or changed by hand. Run "
                        f"`mars {_COMMANDS.get(phase, phase)} {self.path}` to make it again. To go on with a file of "
                        f"your own, copy it and {RESOLVED_CONFIG} to a new run directory: what no phase of a run made "
                        "is taken as it is."
                    )
        return None

    def _is_intact(self, file: str | Path, left: Mapping[str, object]) -> bool:
        path = self.path / file
        if not path.is_file() or path.stat().st_size != left["bytes"]:
            return False
        return content_of(path).sha256 == left["sha256"]

    def _seal(self, outputs: Sequence[Path]) -> dict[str, object]:
        """Has files on the disk, with all folders on their way, and returns what they hold."""
        paths = [path for output in outputs for path in files_in(self.path / output)]
        folders = {folder for path in paths for folder in path.parents if folder.is_relative_to(self.path)}
        for path in (*paths, *folders):
            sync(path)
        return {path.relative_to(self.path).as_posix(): asdict(content_of(path)) for path in paths}

    # What happens.

    @contextmanager
    def phase(self, name: str, inputs: Mapping[str, str], outputs: Sequence[Path] = ()) -> Iterator[None]:
        """Notes a phase while the block runs: running, then done, failed or interrupted.

        What it leaves is on the disk before it is called done.

        Args:
            name: of the phase.
            inputs: name -> hash of all that it is made from (see `hash_inputs`).
            outputs: files and folders that it leaves, relative to the run directory; those that are there are noted.
        """
        earlier = self.phases().get(name, {})
        resumed = earlier.get("inputs") == inputs and earlier.get("status") != "done"
        earlier_seconds = earlier.get("seconds", 0.0) if resumed else 0.0
        record = {"status": "running", "inputs": dict(inputs), "started": _now(), "seconds": earlier_seconds}
        self._write_phase(name, record)
        start = time.monotonic()

        def close(status: str, **more: object) -> None:
            seconds = round(earlier_seconds + time.monotonic() - start, 3)
            self._write_phase(name, {**record, "status": status, "finished": _now(), "seconds": seconds, **more})

        try:
            yield
            left = self._seal(outputs)
        except KeyboardInterrupt:
            close("interrupted")
            raise
        except BaseException as error:
            # A full disk has no room for this either, and the first error is the one to know.
            with suppress(OSError):
                close("failed", error=f"{type(error).__name__}: {error}")
            raise
        close("done", outputs=left)

    def append_event(self, event: str, **fields: object) -> None:
        """Adds a line `{"time", "event", ...fields}` to events.jsonl."""
        append_jsonl(self.path / files.EVENTS, {"time": _now(), "event": event, **fields})

    def _write_phase(self, name: str, record: Mapping[str, object]) -> None:
        state = self.state()
        peak = max(state.get("peak_memory_bytes", 0), peak_memory_bytes())
        phases = {**state["phases"], name: record}
        self.append_event("phase", phase=name, status=record["status"])
        sync(self.path / files.EVENTS)
        write_json(self.path / files.STATE, {**state, "phases": phases, "peak_memory_bytes": peak})


# Of phases without a command of their own name.
_COMMANDS = {"data": "run", "merge": "export --merged"}


def files_in(path: Path) -> list[Path]:
    """The files in a folder and below it, in order; or the file itself."""
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path] * path.is_file()


def hash_inputs(*inputs: Path | str) -> str:
    """SHA-256 of what a phase starts from: files by their content, texts (such as a config section) as they are.

    A folder counts by the names and contents of its files.
    """
    digest = hashlib.sha256()
    for item in inputs:
        if isinstance(item, Path) and item.is_dir():
            item = "".join(f"{file.relative_to(item)} {content_of(file).sha256}\n" for file in files_in(item))
        content = (content_of(item).sha256 if isinstance(item, Path) else item).encode()
        digest.update(len(content).to_bytes(8, "big") + content)
    return digest.hexdigest()


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
