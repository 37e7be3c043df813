"""Settings that can only be judged against the checkpoint and the data, refused before any step.

Those that can be judged from the config alone are refused in `config.schema`.
"""

from collections.abc import Sequence
from pathlib import Path

from mars_jax.adapters.targets import Targets
from mars_jax.config.load import Config
from mars_jax.data.batches import subset
from mars_jax.data.records import Record
from mars_jax.errors import ConfigError
from mars_jax.hub.read import check_weights
from mars_jax.job.base import JobBase
from mars_jax.job.data import JobData


def check_model(config: Config, base: JobBase) -> None:
    """Refuses a checkpoint, targets or ranks that can't be used, reading headers only, before the data are read.

    Raises:
        ConfigError: no usable checkpoint, weights that differ from its config.json, a target without a hit, or a rank
            beyond a width.
    """
    _ = base.targets
    check_weights(base.checkpoint)
    sizes = config.probe.num_samples
    if config.lora.is_searched and len(sizes) < 2:
        raise ConfigError(
            f"probe.num_samples is {list(sizes)}; the laws need at least two numbers of samples. Add another."
        )


def check_data(config: Config, base: JobBase, data: JobData) -> None:
    """Refuses samples that the job can't train on.

    Raises:
        ConfigError: more samples asked for than there are, or modules that get no gradient.
    """
    train = data.search.train
    check_sizes(config, len(train))
    check_pictures(config, base.targets, train)


def check_pictures(config: Config, targets: Targets, train: Sequence[Record]) -> None:
    """Refuses to train modules that only pictures reach on samples without any.

    Args:
        config: of the job.
        targets: the linears that take adapters.
        train: training samples.

    Raises:
        ConfigError: there is no picture, and such a module isn't frozen.
    """
    dead = _of_pictures(config, targets)
    if dead and not any(record.images for record in train):
        freeze = ", ".join(f"lora.modules.{module}.ranks: [0]" for module in dead)
        raise ConfigError(
            f"no training sample has a picture, so {' and '.join(dead)} would get no gradient: freeze "
            f"{'them' if len(dead) > 1 else 'it'} ({freeze}), or give samples with pictures."
        )


def check_probed_pictures(config: Config, targets: Targets, train: Sequence[Record]) -> None:
    """Refuses to probe modules that only pictures reach at sizes D whose samples have no picture.

    Args:
        config: of the job.
        targets: the linears that take adapters.
        train: training samples.

    Raises:
        ConfigError: there is such a size.
    """
    dead = _of_pictures(config, targets)
    if not dead:
        return
    pictured = [bool(record.images) for record in train]
    sizes = config.probe.num_samples
    bare = [size for size in sizes if not any(pictured[i] for i in subset(len(train), size, config.seed))]
    if bare:
        raise ConfigError(
            f"none of the training samples that probes of D = {', '.join(map(str, bare))} read has a picture (of all "
            f"{len(train)}, {sum(pictured)} have), so {' and '.join(dead)} would get no gradient there. Give larger "
            "probe.num_samples or more samples with pictures, or freeze what only pictures reach (ranks: [0])."
        )


def _of_pictures(config: Config, targets: Targets) -> list[str]:
    """Trained modules that only pictures reach."""
    reached = {target.module for path, target in targets.items() if path.startswith("llm/")}
    return [module for module, ranks in config.lora.grids.items() if max(ranks) > 0 and module not in reached]


def check_sizes(config: Config, num_samples: int) -> None:
    """Refuses data sizes that the training split can't give.

    Args:
        config: of the job.
        num_samples: training samples.

    Raises:
        ConfigError: more samples asked for than there are.
    """
    asked = {"probe.num_samples": max(config.probe.num_samples)} if config.lora.is_searched else {}
    if config.selection.target_num_samples:
        asked["selection.target_num_samples"] = config.selection.target_num_samples
    for key, value in asked.items():
        if value > num_samples:
            raise ConfigError(
                f"{key} asks for {value} training samples, but the training split has {num_samples}. "
                f"Choose at most {num_samples}, or give more data."
            )


def check_searched(config: Config) -> None:
    """Refuses to search where the config gives every module one rank.

    Raises:
        ConfigError: it does.
    """
    if not config.lora.is_searched:
        ranks = ", ".join(f"{module} {grid[0]}" for module, grid in config.lora.grids.items())
        raise ConfigError(
            f"lora.modules gives every module one rank ({ranks}), so there is nothing to search. Give at least one "
            "module two ranks or more; or fine-tune with these ranks by `mars run`."
        )


def check_there(path: Path, phase: str) -> None:
    """Refuses to go on without the output of an earlier phase.

    Raises:
        ConfigError: it is missing.
    """
    if not path.exists():
        raise ConfigError(f"{path} is missing: run `mars {phase}` first, or `mars run` for every phase.")
