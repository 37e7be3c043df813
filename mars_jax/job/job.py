"""A job: one run's config, directory, base, data and engines, for phases to hand to what they call."""

from dataclasses import dataclass

from mars_jax.config.load import Config
from mars_jax.job.base import JobBase
from mars_jax.job.data import JobData
from mars_jax.job.directory import RunDirectory
from mars_jax.job.engines import Engines
from mars_jax.job.inputs import InputsOf
from mars_jax.job.prices import Prices
from mars_jax.job.sources import JobSources
from mars_jax.runtime.progress import Reporter


@dataclass(frozen=True)
class Job:
    """The parts of a run. Nothing is read or computed until it is asked for.

    Attributes:
        config: its settings.
        reporter: where it reports to.
        directory: its files.
        base: checkpoint, targets, devices and frozen parameters.
        data: splits, shapes and batches.
        engines: compiled training functions.
        prices: FLOPs of its parts.
        inputs: what its lanes read.
        sources: the files that it is made from, by their content.
    """

    config: Config
    reporter: Reporter
    directory: RunDirectory
    base: JobBase
    data: JobData
    engines: Engines
    prices: Prices
    inputs: InputsOf
    sources: JobSources


def make_job(config: Config, reporter: Reporter, directory: RunDirectory | None = None) -> Job:
    """The job of a config, in its own run directory unless given."""
    base = JobBase(config)
    directory = directory or RunDirectory(config.run_dir)
    data = JobData(config, reporter, base)
    return Job(
        config,
        reporter,
        directory,
        base,
        data,
        Engines(config, reporter, base, data),
        Prices(config, base, data),
        InputsOf(config, base, data),
        JobSources(config, reporter, directory, base, data),
    )
