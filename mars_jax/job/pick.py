"""The pick of a run's search, as later phases take it."""

from mars_jax.job import files
from mars_jax.job.checks import check_there
from mars_jax.job.job import Job
from mars_jax.runtime.jsonfiles import read_json


def picked_ranks(job: Job) -> dict[str, int]:
    """Module -> picked rank, 0 where the module is frozen.

    Raises:
        ConfigError: nothing is picked yet.
    """
    file = job.directory / files.SELECTION
    check_there(file, "select")
    return dict.fromkeys(job.config.lora.grids, 0) | read_json(file)["pick"]
