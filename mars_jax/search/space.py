"""The search space and the laws of a job, as strategies take them."""

from collections.abc import Sequence

import jax

from mars_jax.config.load import Config
from mars_jax.job import files
from mars_jax.job.job import Job
from mars_jax.laws.fit import Laws, fit_laws
from mars_jax.laws.records import LaneRecord
from mars_jax.search.probes.design import whole_design
from mars_jax.search.strategies.base import Space


def fit_records(config: Config, records: Sequence[LaneRecord]) -> Laws:
    """The laws of some records, fitted as a config asks."""
    return fit_laws(
        records,
        key=jax.random.key(config.seed),
        num_bootstraps=config.laws.bootstraps,
        measuring_interval=2 ** (1 / config.probe.looks_per_doubling) - 1,
        huber=config.laws.huber,
    )


def read_laws(job: Job) -> Laws:
    """The laws that the fit phase wrote."""
    return Laws.from_json(job.directory.read(files.LAWS))


def job_space(job: Job) -> Space:
    """The space of a job's config; its laws are those that the fit phase wrote."""
    config = job.config
    return Space(
        grids=config.lora.grids,
        num_samples=job.data.target_num_samples(),
        steps=config.finetune.steps,
        probed=whole_design(config),
        sizes=config.probe.num_samples,
        parameters_per_rank=job.base.parameters_per_rank,
        rates=config.learning_rates(config.finetune.learning_rate),
        fit=lambda records: read_laws(job),
        most_together=config.probe.lanes_per_program,
        seed=config.seed,
        factors=config.lora.factors,
    )
