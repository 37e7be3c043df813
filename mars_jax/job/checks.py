"""What a config asks for that can only be judged against the checkpoint and the data, refused before any step.

What can be judged from the config alone is in `config.schema`.
"""

from mars_jax.errors import ConfigError
from mars_jax.hub.read import open_safetensors, weight_files
from mars_jax.job.workspace import Workspace


def check_model(workspace: Workspace) -> None:
    """Refuses a checkpoint, targets or ranks that can't be used, reading headers only, before the data are read.

    Raises:
        ConfigError: no usable checkpoint, a target without a hit, or a rank beyond a width.
    """
    _ = workspace.targets
    for file in weight_files(workspace.checkpoint):
        with open_safetensors(file):
            pass
    sizes = workspace.config.probe.num_samples
    if workspace.config.lora.is_searched and len(sizes) < 2:
        raise ConfigError(
            f"probe.num_samples is {list(sizes)}; the laws need at least two numbers of samples. Add another."
        )


def check_sizes(workspace: Workspace) -> None:
    """Refuses data sizes that the training split can't give.

    Raises:
        ConfigError: more samples asked for than there are.
    """
    config, total = workspace.config, len(workspace.search.train)
    wanted = {"probe.num_samples": max(config.probe.num_samples)} if config.lora.is_searched else {}
    if config.selection.target_num_samples:
        wanted["selection.target_num_samples"] = config.selection.target_num_samples
    for key, value in wanted.items():
        if value > total:
            raise ConfigError(
                f"{key} asks for {value} training samples, but the training split has {total}. "
                f"Choose at most {total}, or give more data."
            )
