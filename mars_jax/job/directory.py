"""The run directory: held by one process at a time, and made with one config.

Others may read it meanwhile. It imports nothing heavy: `mars status` must answer at once.
"""

import errno
import importlib.metadata
import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml

from mars_jax.config.load import RESOLVED_CONFIG, Config
from mars_jax.errors import ConfigError, DataError
from mars_jax.job import files, lock
from mars_jax.job.book import Book, hash_inputs
from mars_jax.job.documents import SHAPES
from mars_jax.runtime.durable import make_folder, remove_leftovers
from mars_jax.runtime.jsonfiles import Document, read_json, read_jsonl, write_text

_PACKAGES = ("mars_jax", "jax", "flax", "optax", "transformers")
# What a full or read-only device raises is for the command to report.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


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

    def read(self, file: Path) -> Document:
        """The document of a JSON file of the run, such as `files.LAWS`.

        Raises:
            DataError: it can't be read, isn't JSON, or a key that is read is missing or of another type.
        """
        document: Document = read_json(self / file, SHAPES[file])
        return document

    def lines(self, file: Path, warn: Callable[[str], None]) -> list[Document]:
        """The records of a JSON Lines file of the run, such as `files.LANES`; none if it is absent.

        Args:
            file: which.
            warn: called with a message where the last line is incomplete.

        Raises:
            DataError: as `read`, of a line.
        """
        return read_jsonl(self / file, warn, SHAPES[file])

    def check_links(self) -> None:
        """Refuses links in the places of a run's files that lead nowhere: they would be taken for files never written.

        Raises:
            DataError: there is one.
        """
        for name in sorted({path for file in (Path(RESOLVED_CONFIG), *files.EVERY) for path in (file, *file.parents)}):
            file = self / name
            if file.is_symlink() and not file.exists():
                raise DataError(
                    f"{file} is a link to {file.readlink()}, which leads nowhere. Put back what it led to, or remove "
                    "the link: what it stood for is then made again."
                )

    @classmethod
    @contextmanager
    def open(cls, config: Config) -> Iterator["RunDirectory"]:
        """Makes or re-opens `config.run_dir` and holds it, for this process alone, until the block ends.

        Raises:
            ConfigError: the directory can't be written, is held by another process, holds something that isn't a
                run, or was made with another config.
        """
        run = cls(config.run_dir)
        with run._own_errors():
            make_folder(run.path)
            run._check_ours()
            run.check_links()
            with lock.holding(run.path):
                remove_leftovers(run.path)
                settings = _flatten(yaml.safe_load(text := config.resolved_yaml()))
                run._check_config(text, settings)
                run.book.note(versions=_versions(), config=_hash(settings))
                run.book.append_event("opened")
                yield run

    @contextmanager
    def _own_errors(self) -> Iterator[None]:
        """Explains errors of the file system that concern the directory, but for a full disk."""
        try:
            yield
        except OSError as error:
            named = Path(error.filename) if isinstance(error.filename, str) else None
            within = named is not None and (named.is_relative_to(self.path) or self.path.is_relative_to(named))
            if error.errno in _NO_ROOM or not (within or isinstance(error, PermissionError)):
                raise
            if isinstance(error, PermissionError) or named == self.path or not self.path.is_dir():
                raise ConfigError(
                    f"can't write the run directory {self.path}: {error.strerror}. Set run_dir to a folder that you "
                    "can write."
                ) from None
            raise ConfigError(
                f"can't use {named} in the run directory: {error.strerror}. Something else lies where a file or a "
                "folder of the run belongs: move it away, and run the same command again."
            ) from None

    def _check_ours(self) -> None:
        """Refuses to write between the files of something else."""
        names = {entry.name for entry in self.path.iterdir()}
        # A first opening that was killed leaves a lock, and perhaps a config half written under another name.
        own = (lock.LOCK, lock.OWNER, lock.CLAIM)
        foreign = [name for name in names if name not in own and not name.startswith(RESOLVED_CONFIG)]
        if RESOLVED_CONFIG not in names and foreign:
            raise ConfigError(
                f"{self.path} holds files but no {RESOLVED_CONFIG}, so it isn't a run directory. "
                "Set run_dir to a new folder."
            )

    def _check_config(self, text: str, here: Mapping[str, object]) -> None:
        """Writes the settings of the config, by their text, or compares them with those that the run was made with."""
        file = self.path / RESOLVED_CONFIG
        if not file.exists():
            write_text(file, text)
            return
        damage, settings = _settings(file)
        there = _flatten(settings)
        known = self.book.state().get("config")
        if damage or known not in (None, _hash(there)):
            # What it held is known by its hash alone.
            if known == _hash(here):
                write_text(file, text)
                return
            if damage or _hash(there) == _hash(here):
                raise DataError(
                    f"{file} {damage or 'holds other settings than the run was made with'}: it was damaged, or changed "
                    "by hand. Put it back from a copy, or give the config that the run was made with, and it is "
                    "written again; for other settings set another run_dir."
                )
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


def _settings(file: Path) -> tuple[str | None, object]:
    """What is wrong with a file of settings, if it can't be one; and its settings."""
    if file.is_dir():
        return "is a folder", None
    try:
        text = file.read_text(encoding="utf-8")
        settings = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return "is not YAML", None
    if not isinstance(settings, Mapping):
        return ("is not a list of settings" if text.strip() else "is empty"), None
    return None, settings


def _hash(settings: Mapping[str, object]) -> str:
    """Of all settings but `run_dir`, since a run directory may be moved."""
    return hash_inputs(repr({key: value for key, value in settings.items() if key != "run_dir"}))


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
