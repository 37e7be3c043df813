"""The run directory: held by one process at a time, and made with one config.

Others may read it meanwhile. It imports nothing heavy: `mars status` must answer at once.
"""

import fcntl
import importlib.metadata
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml

from mars_jax.config.load import RESOLVED_CONFIG, Config
from mars_jax.errors import ConfigError
from mars_jax.job.book import Book
from mars_jax.runtime.jsonfiles import write_text

_LOCK = "lock"
_PACKAGES = ("mars_jax", "jax", "flax", "optax", "transformers")


@dataclass(frozen=True)
class RunDirectory:
    """A run directory. Made directly it can be read; a run that writes takes it from `RunDirectory.open`.

    Attributes:
        path: the directory. `run / files.LANES` is the path of a file in it.
    """

    path: Path

    def __truediv__(self, file: str | Path) -> Path:
        return self.path / file

    @property
    def book(self) -> Book:
        """Its phases and events."""
        return Book(self.path)

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
                run.book.write_versions(_versions())
                run.book.append_event("opened")
            except PermissionError as error:
                raise run._cannot_write(error) from None
            yield run

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
        file = self.path / RESOLVED_CONFIG
        if not file.exists():
            write_text(file, config.resolved_yaml())
            return
        there = _flatten(yaml.safe_load(file.read_text(encoding="utf-8")))
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


def _flatten(value: object, prefix: str = "") -> dict[str, object]:
    if not isinstance(value, Mapping):
        return {prefix: value}
    return {
        path: leaf
        for key, item in value.items()
        for path, leaf in _flatten(item, f"{prefix}.{key}" if prefix else str(key)).items()
    }


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in _PACKAGES}}
