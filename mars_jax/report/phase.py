"""The phase `report`. It is cheap, so it writes the page again each time."""

from mars_jax.job import files
from mars_jax.job.job import Job
from mars_jax.job.phase import Inputs, Phase, files_of
from mars_jax.report.collect import READ
from mars_jax.report.page import write_report
from mars_jax.runtime.jsonfiles import Document


def _inputs(job: Job) -> Inputs:
    return files_of(job, *READ)


def _work(job: Job) -> Document:
    return {"report": write_report(job.directory.path)}


REPORT = Phase("report", _inputs, (files.REPORT,), _work, again=True)
