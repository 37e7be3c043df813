"""One self-contained HTML page (and the same as JSON) from the files of a run directory. Runs nothing, fits nothing."""

from mars_jax.report.page import write_report

__all__ = ["write_report"]
