"""What a run is made from: files of samples, pictures and base, each known by its content.

sources.json lists them all. A file whose size, times and inode are as they were is not read again; the time of the last
change can't be set back as that of the last write can. Once anything has been trained, changed files are refused: lanes
and final runs of other data must not be mixed with those of this run. A file that is gone by now can't have changed
what was made from it; who needs it reports that. Weights are read once for their hash, shards in parallel: 0.7 s
a GiB on a core of a Xeon, from memory; and then again only where something was written to them.
"""

import os
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

from mars_jax.config.load import Config
from mars_jax.data.rows import source_files
from mars_jax.errors import ConfigError, DataError
from mars_jax.hub.paths import local, on_hub
from mars_jax.job import files
from mars_jax.job.base import JobBase
from mars_jax.job.book import hash_inputs
from mars_jax.job.data import JobData
from mars_jax.job.directory import RunDirectory
from mars_jax.runtime.durable import content_of, stamp_of
from mars_jax.runtime.jsonfiles import load_json, write_json
from mars_jax.runtime.progress import Reporter
from mars_jax.runtime.text import first_of

# Configs, tokenizer, processor, chat template and weights.
_OF_BASE = (".json", ".txt", ".model", ".jinja", ".safetensors")
_TRAINED = (
    files.LANES,
    files.FINAL_RUN,
    files.SWEEP,
    files.ADAPTERS,
    files.SUMMARY,
    files.TRIALS,
)
_CHECKPOINTS = (
    files.PROBE_CHECKPOINTS,
    files.SWEEP_CHECKPOINTS,
    files.FINETUNE_CHECKPOINTS,
    files.COMPARISON_CHECKPOINTS,
)


@dataclass(frozen=True)
class Source:
    """What a file that the run is made from holds, and size, times and inode by which a change is noticed."""

    sha256: str
    stamp: list[int] | None


Records = Mapping[str, Source]
"""Name of a file -> what it holds."""


@dataclass(frozen=True)
class SourcesRecord:
    """sources.json; the digest shows whether the rest is as it was written."""

    digest: str
    data: Records
    pictures: Records
    base: Records


@dataclass(frozen=True)
class Sources:
    """The files that a run is made from, and what they hold."""

    data: Records
    pictures: Records
    base: Records

    @property
    def digest(self) -> str:
        """Of names and contents."""
        contents = [{name: record.sha256 for name, record in sorted(kind.items())} for kind in self.kinds.values()]
        return hash_inputs(repr(contents))

    @property
    def kinds(self) -> dict[str, Records]:
        """data, pictures and base."""
        return {"data": self.data, "pictures": self.pictures, "base": self.base}


class JobSources:
    """The sources of a job, read once a command."""

    def __init__(
        self, config: Config, reporter: Reporter, directory: RunDirectory, base: JobBase, data: JobData
    ) -> None:
        self._config = config
        self._reporter = reporter
        self._directory = directory
        self._base = base
        self._data = data
        self._began_ns = time.time_ns()

    def check(self) -> None:
        """Compares the files with those of earlier commands on this run; pictures are those that were there then.

        Where nothing was trained yet, what was made from other files is made again.

        Raises:
            ConfigError: files changed since something was trained from them.
        """
        _ = self._kept

    @cached_property
    def digest(self) -> str:
        """Of all of them; reads the data where they have not been read on this run."""
        if self._kept:
            return self._kept.digest
        sources = Sources(self._files["data"], self._pictures(), self._files["base"])
        noted = self._directory.read(files.DATA).get("sources") if (self._directory / files.DATA).exists() else None
        if noted not in (None, sources.digest) and self._is_trained():
            raise self._refusal([f"{self._directory / files.SOURCES} was damaged or deleted, and files"])
        self._write(sources)
        return sources.digest

    def of_base(self) -> str:
        """Digest of the base alone, for what depends on no data."""
        base = self._kept.base if self._kept else self._files["base"]
        return hash_inputs(repr(sorted((name, record.sha256) for name, record in base.items())))

    def listed(self) -> dict[str, str]:
        """File of samples -> hash of its content."""
        data = self._kept.data if self._kept else self._files["data"]
        return {name: record.sha256 for name, record in data.items()}

    @cached_property
    def _kept(self) -> Sources | None:
        """What earlier commands noted, if it still holds; with the times of today."""
        noted = self._noted
        if noted is None:
            return None
        changed, pictures = [], dict(noted.pictures)
        paths = {name: Path(name) for name in pictures}
        for name, record in self._hashed(paths, noted.pictures).items():
            changed += [name] * (record.sha256 != noted.pictures[name].sha256)
            pictures[name] = record
        now = Sources({**noted.data, **self._files["data"]}, pictures, {**noted.base, **self._files["base"]})
        for kind in ("data", "base"):
            before, after = noted.kinds[kind], self._files[kind]
            changed += [
                name for name, record in after.items() if name not in before or before[name].sha256 != record.sha256
            ]
        if changed and self._is_trained():
            raise self._refusal(changed)
        if changed:
            self._reporter.notice(f"data: {first_of(changed)} changed since, so the data are read again")
            for file in (files.DATA, files.SOURCES):
                (self._directory / file).unlink(missing_ok=True)
            return None
        if now != noted:
            self._write(now)
        return now

    @cached_property
    def _noted(self) -> Sources | None:
        """What sources.json holds; None where it is absent or damaged, since all of it can be found again."""
        if not (self._directory / files.SOURCES).exists():
            return None
        try:
            record = load_json(self._directory / files.SOURCES, SourcesRecord)
        except DataError as error:
            self._reporter.warn(f"{error} It is written again.")
            return None
        sources = Sources(record.data, record.pictures, record.base)
        if sources.digest != record.digest:
            self._reporter.warn(
                f"{self._directory / files.SOURCES} was damaged or changed by hand; it is written again"
            )
            return None
        return sources

    @cached_property
    def _files(self) -> dict[str, Records]:
        """The files of samples and of the base that are there now."""
        noted = self._noted
        data = self._config.data
        paths = [path for path in (data.train, data.validation, data.test) if path]
        samples = {_name(file, path): file for path in paths for file in source_files(path)}
        checkpoint = self._base.checkpoint
        there = sorted(checkpoint.iterdir()) if checkpoint.is_dir() else []
        base = {
            _name(file, self._config.model.checkpoint): file
            for file in there
            if file.suffix in _OF_BASE and file.is_file()
        }
        return {
            "data": self._hashed(samples, noted.data if noted else {}),
            "base": self._hashed(base, noted.base if noted else {}),
        }

    def _pictures(self) -> Records:
        return {str(path): Source(digest, self._stamp(path)) for path, digest in sorted(self._data.pictures().items())}

    def _hashed(self, paths: Mapping[str, Path], noted: Records) -> dict[str, Source]:
        """What files hold, read only where they may have changed; those that are gone are left out."""

        def record(name: str, path: Path) -> Source | None:
            try:
                stamp = self._stamp(path)
                if name in noted and stamp and noted[name].stamp == stamp:
                    return noted[name]
                return Source(content_of(path).sha256, stamp)
            except (FileNotFoundError, NotADirectoryError):
                return None
            except OSError as error:
                raise DataError(f"can't read {path}: {error.strerror}. Make it readable.") from None

        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            records = pool.map(record, paths.keys(), paths.values())
            return {name: found for name, found in zip(paths, records, strict=True) if found}

    def _stamp(self, path: Path) -> list[int] | None:
        """What changes with a file's content; None where a change since this command began could pass unnoticed."""
        stamp = stamp_of(path, self._began_ns)
        return list(stamp) if stamp else None

    def _write(self, sources: Sources) -> None:
        kinds = {
            kind: {name: asdict(record) for name, record in sorted(records.items())}
            for kind, records in sources.kinds.items()
        }
        write_json(self._directory / files.SOURCES, {"digest": sources.digest, **kinds})

    def _is_trained(self) -> bool:
        """Whether anything was trained in this run: finished, or in a checkpoint to go on from."""
        steps = (path for folder in _CHECKPOINTS for path in (self._directory / folder).rglob("*") if path.is_dir())
        return any((self._directory / file).exists() for file in _TRAINED) or any(p.name.isdigit() for p in steps)

    def _refusal(self, changed: list[str]) -> ConfigError:
        path = self._directory.path
        kind = "lanes" if (self._directory / files.LANES).exists() else "results"
        return ConfigError(
            f"run directory {path} has {kind} of other data or of another base: {first_of(changed)} changed since. Set "
            f"another run_dir, take the files back, or delete {path} to start again."
        )


def _name(file: Path, setting: Path) -> str:
    """The name of a file of a setting: its path, or the address on the hub, whose folder depends on the machine."""
    if not on_hub(setting):
        return str(file)
    folder = local(setting)
    within = file.relative_to(folder) if file.is_relative_to(folder) else Path(file.name)
    return f"{setting}/{within}"
