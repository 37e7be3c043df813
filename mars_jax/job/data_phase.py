"""The phase `data`: checks checkpoint and targets, then reads and checks every sample."""

from collections.abc import Mapping

from mars_jax.config.load import Config
from mars_jax.data.rows import source_files
from mars_jax.errors import ConfigError
from mars_jax.job import files
from mars_jax.job.book import hash_inputs
from mars_jax.job.checks import check_data, check_model
from mars_jax.job.job import Job
from mars_jax.job.phase import Inputs, Phase, sections
from mars_jax.runtime.jsonfiles import Document, read_json, write_json


def _hashes(config: Config) -> dict[str, str]:
    """File of samples -> hash of its content."""
    paths = (config.data.train, config.data.validation, config.data.test)
    return {str(file): hash_inputs(file) for path in paths if path for file in source_files(path)}


def _inputs(job: Job) -> Inputs:
    hashes = _hashes(job.config)
    _check_same_data(job, hashes)
    return repr(hashes), sections(job.config, "data", "model")


def _check_same_data(job: Job, hashes: Mapping[str, str]) -> None:
    """Refuses to mix lanes of other data with those of this run."""
    data, path = job.directory / files.DATA, job.directory.path
    if not (data.exists() and (job.directory / files.LANES).exists()):
        return
    before = read_json(data)["files"]
    changed = [name for name in {**before, **hashes} if before.get(name) != hashes.get(name)]
    if changed:
        raise ConfigError(
            f"run directory {path} has lanes of other data: {', '.join(changed)} changed since. Set another run_dir, "
            f"take the files back, or delete {path} to start again."
        )


def _work(job: Job) -> Document:
    check_model(job.config, job.base)
    job.reporter.notice("data: reading and checking every sample")
    summary = {**job.data.summary(), "files": _hashes(job.config)}
    check_data(job.config, job.base, job.data, job.reporter)
    write_json(job.directory / files.DATA, summary)
    sizes = ", ".join(f"{summary[name]} {name}" for name in ("train", "validation", "test"))
    formats = ", ".join(summary["formats"])
    job.reporter.notice(f"data: {sizes} samples, read as {formats}, {len(summary['dropped'])} left out")
    job.reporter.notice(_padding(job.config, summary["padding"]))
    return summary


def _padding(config: Config, padding: Document) -> str:
    now, other = ("packed", "unpacked") if config.data.packing else ("unpacked", "packed")
    seen, instead = padding[now], padding[other]
    return (
        f"data: {seen['tokens']:.0%} of the tokens and {seen['tiles']:.0%} of the tiles that a step of "
        f"{padding['batch_size']} samples computes are padding, {now}; it would be {instead['tokens']:.0%} and "
        f"{instead['tiles']:.0%} {other}"
    )


DATA = Phase("data", _inputs, files.DATA, _work)
