"""The pick of a run's search, as later phases take it."""

from mars_jax.errors import ConfigError
from mars_jax.job import files
from mars_jax.job.checks import check_there
from mars_jax.job.job import Job


def picked_ranks(job: Job) -> dict[str, int]:
    """Module -> picked rank, 0 where the module is frozen.

    Raises:
        ConfigError: nothing is picked yet, or not for the modules of the config.
    """
    file = job.directory / files.SELECTION
    check_there(file, "select")
    pick = job.directory.read(files.SELECTION)["pick"]
    modules = job.config.lora.grids
    wrong = [f"{module} {rank}" for module, rank in pick.items() if module not in modules or rank < 0]
    if wrong or not any(pick.values()):
        raise ConfigError(
            f"{file}: pick has {', '.join(wrong) or 'no rank above 0'}; the modules are {', '.join(modules)}, and "
            "ranks are 0 (frozen) or more. Run `mars select` for a pick, or give a whole one of your own."
        )
    return dict.fromkeys(modules, 0) | pick
