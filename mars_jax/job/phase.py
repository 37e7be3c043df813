"""Phases of a run: what each starts from, what it leaves, and when it is skipped.

A pipeline is a tuple of phases. Finished work with unchanged inputs is skipped while what it left is whole; interrupted
work goes on.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mars_jax.config.load import Config
from mars_jax.job.book import hash_inputs
from mars_jax.job.job import Job
from mars_jax.runtime.jsonfiles import Document
from mars_jax.runtime.text import first_of

Inputs = Mapping[str, Path | str]
"""Name -> file relative to the run directory, by its content, or text: all that the result of a phase depends on."""


@dataclass(frozen=True)
class Phase:
    """A phase.

    Attributes:
        name: in messages and in state.json.
        inputs: what its result depends on; raises where an earlier phase is missing.
        outputs: files and folders that it leaves, relative to the run directory. The first is always there.
        work: does it, and returns the document that describes the result.
        result: that document of finished work; by default the first output, read as JSON.
        applies: whether a pipeline with this config has the phase.
        again: whether it is cheap and always runs.
        repair: given the damaged outputs, writes them anew where that needs less than the work. Returns whether it
            could: if not, the work is done again. Raises where that would be dear, or would not mend them.
        scratch: folders that nothing needs once it is finished.
    """

    name: str
    inputs: Callable[[Job], Inputs]
    outputs: Sequence[Path]
    work: Callable[[Job], Document]
    result: Callable[[Job], Document] | None = None
    applies: Callable[[Config], bool] = lambda config: True
    again: bool = False
    repair: Callable[[Job, Sequence[Path]], bool] = lambda job, damaged: False
    scratch: Sequence[Path] = ()


def run_phase(phase: Phase, job: Job) -> Document:
    """Runs a phase unless what it left from the same inputs is there and whole.

    Returns:
        The document that describes its result.

    Raises:
        DataError: an input isn't what the phase that made it left.
    """
    book = job.directory.book
    inputs, phases = phase.inputs(job), book.phases()
    book.check_all((item for item in inputs.values() if isinstance(item, Path)), phases)
    hashes = {
        name: hash_inputs(job.directory / item if isinstance(item, Path) else item) for name, item in inputs.items()
    }
    if not phase.again and _is_finished(phase, job, hashes, phases.get(phase.name, {})):
        job.reporter.notice(f"{phase.name}: done before, skipped")
        document = phase.result(job) if phase.result else job.directory.read(phase.outputs[0])
    else:
        with book.phase(phase.name, hashes, phase.outputs):
            document = phase.work(job)
    for folder in phase.scratch:
        shutil.rmtree(job.directory / folder, ignore_errors=True)
    return document


def _is_finished(phase: Phase, job: Job, hashes: Mapping[str, str], record: Document) -> bool:
    """Whether a phase need not run; otherwise, if it had been finished, reports why it runs again."""
    if record.get("status") != "done":
        return False
    before = record.get("inputs") or {}
    if before != hashes:
        changed = ", ".join(name for name in {**before, **hashes} if before.get(name) != hashes.get(name))
        why = f"{changed} changed" if before else "an older version did not note its inputs"
        job.reporter.notice(f"{phase.name}: {why}, done again")
        return False
    damaged = job.directory.book.damaged(record)
    if not damaged and (job.directory / phase.outputs[0]).exists():
        return True
    names = first_of([file.as_posix() for file in damaged or phase.outputs[:1]])
    repaired = phase.repair(job, damaged)
    how = "written again" if repaired else "done again"
    job.reporter.warn(f"{phase.name}: {names} isn't there as the phase left it (damaged, deleted or edited); {how}")
    return repaired


def files_of(job: Job, *paths: Path) -> dict[str, Path]:
    """Those of some files that are there, for the inputs of a phase."""
    return {path.as_posix(): path for path in paths if (job.directory / path).exists()}


def sections(config: Config, *names: str) -> dict[str, str]:
    """Sections of a config as text, for the inputs of a phase.

    A run directory takes one config alone. They are inputs all the same, each by its name: so the record of a phase
    shows what it depends on, and no edit of the config that passes unnoticed can leave old results in place.
    """
    return {name: repr(getattr(config, name)) for name in names}


def sources_of(job: Job) -> dict[str, str]:
    """Data, pictures and base by their content, for the inputs of a phase."""
    return {"data, pictures and base": job.sources.digest}
