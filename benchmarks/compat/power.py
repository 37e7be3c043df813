"""Power cuts without one: what a process synced is recorded, and afterwards the rest is taken away.

In the process, `record` stands between `os.fsync` and its callers: for each call it keeps what the file holds, or which
files the folder has. What lies there when it begins counts as synced. After the process was killed, `cut` leaves of the
folder what a file system may leave of it, by one of two models:

- `names_kept`: names are as they were at the cut, since file systems with a journal write them down soon and in order;
  of a file only what was synced is left, and of one that never was, nothing. So ext4 left a renamed and empty file.
- `nothing_kept`: as strict as POSIX allows. A folder has the names that it had when it was synced, however files were
  made, renamed and removed since: what was removed is back, what is new is gone. Each holds what was synced of it.

A sync by code that is not Python's is not seen, so that it does not count.
"""

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Model = Literal["names_kept", "nothing_kept"]
MODELS: tuple[Model, ...] = ("names_kept", "nothing_kept")


def record(directory: Path, journal: Path) -> None:
    """Records all later syncs in a folder of this process.

    Args:
        directory: the folder; it may not be there yet.
        journal: another folder, for the record; its files are replaced.
    """
    shutil.rmtree(journal, ignore_errors=True)
    journal.mkdir(parents=True)
    recorder = _Recorder(directory.resolve(), journal, os.fsync)
    if directory.is_dir():
        for folder, _, names in os.walk(recorder.directory):
            for path in (*(Path(folder, name) for name in names), Path(folder)):
                recorder.note(path)
    os.fsync = recorder.fsync  # type: ignore[assignment]


def cut(directory: Path, journal: Path, model: Model) -> None:
    """Takes from a folder what was not synced in it when the process that recorded it was killed."""
    directory = directory.resolve()
    if not directory.is_dir() or not (journal / "syncs.jsonl").exists():
        return
    lines = (journal / "syncs.jsonl").read_text().splitlines()
    syncs = [_Sync(**json.loads(line)) for line in lines if line.endswith("}")]
    if model == "names_kept":
        _keep_names(directory, syncs)
    else:
        _keep_nothing(directory, syncs, journal)


@dataclass(frozen=True)
class _Sync:
    """A sync.

    Attributes:
        path: of the file or folder, relative to the directory.
        inode: of it.
        sha256: of a file's content.
        size: of the content.
        names: of a folder: name -> (inode, sha256 of what was synced of the file; None of a folder).
    """

    path: str
    inode: int
    sha256: str = ""
    size: int = 0
    names: dict[str, tuple[int, str | None]] | None = None


@dataclass
class _Recorder:
    directory: Path
    journal: Path
    real: Callable[[Any], None]
    synced: dict[int, _Sync] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def fsync(self, descriptor: Any) -> None:
        """`os.fsync`, noted."""
        self.real(descriptor)
        number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
        path = Path(os.readlink(f"/proc/self/fd/{number}"))
        if path.is_relative_to(self.directory) and path.exists():
            self.note(path)

    def note(self, path: Path) -> None:
        """Adds a line on what a file or folder holds."""
        name = path.relative_to(self.directory).as_posix()
        with self.lock:
            if path.is_dir():
                names = {}
                for entry in path.iterdir():
                    inode = entry.stat().st_ino
                    kept = None if entry.is_dir() else self._kept(entry, self.synced.get(inode))
                    names[entry.name] = (inode, kept)
                sync = _Sync(name, path.stat().st_ino, names=names)
            else:
                content = path.read_bytes()
                sync = _Sync(name, path.stat().st_ino, hashlib.sha256(content).hexdigest(), len(content))
                self.synced[sync.inode] = sync
                _write(self.journal / sync.sha256, content)
            with (self.journal / "syncs.jsonl").open("a") as file:
                file.write(json.dumps(sync.__dict__) + "\n")

    def _kept(self, path: Path, sync: _Sync | None) -> str:
        """SHA-256 of what is synced of a file: nothing, if it is another one with an inode that was used before."""
        kept = _synced_part(path.read_bytes(), sync)
        sha256 = hashlib.sha256(kept).hexdigest()
        _write(self.journal / sha256, kept)
        return sha256


def _synced_part(content: bytes, sync: _Sync | None) -> bytes:
    """The beginning of a file that was synced; what was written over it is lost with it."""
    if sync and hashlib.sha256(content[: sync.size]).hexdigest() == sync.sha256:
        return content[: sync.size]
    return b""


def _write(path: Path, content: bytes) -> None:
    if not path.exists():
        path.write_bytes(content)


def _keep_names(directory: Path, syncs: list[_Sync]) -> None:
    by_inode = {sync.inode: sync for sync in syncs if sync.names is None}
    for path in [path for path in directory.rglob("*") if path.is_file()]:
        path.write_bytes(_synced_part(path.read_bytes(), by_inode.get(path.stat().st_ino)))


def _keep_nothing(directory: Path, syncs: list[_Sync], journal: Path) -> None:
    folders: dict[str, dict[str, tuple[int, str | None]]] = {}
    for sync in syncs:
        folder, _, name = f"./{sync.path}".rpartition("/")
        if sync.names is not None:
            folders[f"./{sync.path}".removesuffix("/.")] = dict(sync.names)
        elif folders.get(folder, {}).get(name, (0, None))[0] == sync.inode:
            folders[folder][name] = (sync.inode, sync.sha256)
    shutil.rmtree(directory)

    def restore(place: Path, folder: str) -> None:
        place.mkdir()
        for name, (_, sha256) in folders.get(folder, {}).items():
            if sha256 is None:
                restore(place / name, f"{folder}/{name}")
            else:
                shutil.copyfile(journal / sha256, place / name)

    restore(directory, ".")
