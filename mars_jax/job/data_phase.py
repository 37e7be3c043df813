"""The phase `data`: checks checkpoint and targets, then reads and checks every sample."""

from mars_jax.config.load import Config
from mars_jax.job import files
from mars_jax.job.checks import check_data, check_model
from mars_jax.job.job import Job
from mars_jax.job.phase import Inputs, Phase, sections
from mars_jax.runtime.jsonfiles import Document, write_json


def _inputs(job: Job) -> Inputs:
    job.sources.check()
    if not (job.directory / files.DATA).exists():
        check_model(job.config, job.base)  # first, since reading the data may take long
    base = {"base": job.sources.of_base()}
    return {**job.sources.listed(), **base, **sections(job.config, "data", "model")}


def _work(job: Job) -> Document:
    if (job.directory / files.DATA).exists():  # otherwise it was checked for the inputs
        check_model(job.config, job.base)
    job.reporter.notice("data: reading and checking every sample")
    made_from = {"files": job.sources.listed(), "sources": job.sources.digest}
    summary = {**job.data.summary(), "prompt": job.data.prompt(), **made_from}
    check_data(job.config, job.base, job.data)
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


DATA = Phase("data", _inputs, (files.DATA,), _work)
