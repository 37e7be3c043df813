"""The phase `report`. It is cheap, so it writes the page again each time."""

from mars_jax.job.job import Job
from mars_jax.job.phase import Phase
from mars_jax.report.page import write_report
from mars_jax.runtime.jsonfiles import Document


def _work(job: Job) -> Document:
    return {"report": write_report(job.directory.path)}


REPORT = Phase("report", lambda job: ("",), None, _work)
