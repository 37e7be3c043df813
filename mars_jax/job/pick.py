"""The pick of a run's search, as later phases take it."""

from collections.abc import Mapping

from mars_jax.errors import ConfigError
from mars_jax.job import files
from mars_jax.job.checks import check_there
from mars_jax.job.job import Job


def picked(job: Job) -> tuple[Mapping[str, int], Mapping[str, float], int]:
    """Picked ranks, 0 where a module is frozen, factors on learning rates that aren't 1, by module; and the seed.

    Raises:
        ConfigError: nothing is picked yet, or not for the modules of the config.
    """
    file = job.directory / files.SELECTION
    check_there(file, "select")
    document = job.directory.read(files.SELECTION)
    pick, factors = document["pick"], document.get("factors", {})
    modules = job.config.lora.grids
    wrong = [f"{module} {rank}" for module, rank in pick.items() if module not in modules or rank < 0]
    if wrong or not any(pick.values()):
        raise ConfigError(
            f"{file}: pick has {', '.join(wrong) or 'no rank above 0'}; the modules are {', '.join(modules)}, and "
            "ranks are 0 (frozen) or more. Run `mars select` for a pick, or give a whole one of your own."
        )
    odd = [f"{module} {factor}" for module, factor in factors.items() if not (pick.get(module) and factor > 0)]
    if odd:
        raise ConfigError(
            f"{file}: factors has {', '.join(odd)}; a factor is above 0 and of a module that the pick trains. Run "
            "`mars select` for a pick, or give a whole one of your own."
        )
    return dict.fromkeys(modules, 0) | pick, factors, document.get("seed", 0)
