"""Phases of a run: what each starts from, what it leaves, and when it is skipped.

A pipeline is a tuple of phases. Finished work with unchanged inputs is skipped, interrupted work goes on.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mars_jax.config.load import Config
from mars_jax.job.book import hash_inputs
from mars_jax.job.job import Job
from mars_jax.runtime.jsonfiles import Document, read_json

Inputs = tuple[Path | str, ...]
"""Files, by their content, and texts that the result of a phase depends on."""


@dataclass(frozen=True)
class Phase:
    """A phase.

    Attributes:
        name: in messages and in state.json.
        inputs: what its result depends on; raises where an earlier phase is missing.
        output: what it leaves, relative to the run directory: finished only if it is there. None: it always runs.
        work: does it, and returns the document that describes the result.
        result: that document of finished work; by default the output, read as JSON.
        applies: whether a pipeline with this config has the phase.
    """

    name: str
    inputs: Callable[[Job], Inputs]
    output: Path | None
    work: Callable[[Job], Document]
    result: Callable[[Job], Document] | None = None
    applies: Callable[[Config], bool] = lambda config: True


def run_phase(phase: Phase, job: Job) -> Document:
    """Runs a phase unless it left its output from the same inputs.

    Returns:
        The document that describes its result.
    """
    inputs = hash_inputs(*phase.inputs(job))
    if phase.output and job.directory.book.is_done(phase.name, inputs) and (job.directory / phase.output).exists():
        job.reporter.notice(f"{phase.name}: done before, skipped")
        return phase.result(job) if phase.result else read_json(job.directory / phase.output)
    with job.directory.book.phase(phase.name, inputs):
        return phase.work(job)


def sections(config: Config, *names: str) -> str:
    """Sections of a config as text, for the inputs of a phase."""
    return repr([getattr(config, name) for name in names])
