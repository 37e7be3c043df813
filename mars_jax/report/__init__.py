"""The report of a run: one self-contained HTML page, and the same as JSON, from the files of the run directory."""

from mars_jax.report.page import write_report

__all__ = ["write_report"]
