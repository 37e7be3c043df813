"""transformers' numpy image processors of a checkpoint folder (no torch, no torchvision)."""

from pathlib import Path
from typing import Any

from mars_jax.errors import ConfigError


def load_processor(processor_class: Any, directory: Path, **settings: Any) -> Any:
    """The folder's image processor, an instance of `processor_class`, with some settings changed.

    Raises:
        ConfigError: the folder has none, or one that can't be read.
    """
    if not any((directory / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
        raise ConfigError(
            f"{directory} has neither preprocessor_config.json nor processor_config.json. Copy it from the "
            "checkpoint's source: it says how the vision encoder expects pictures scaled and normalised."
        )
    try:
        return processor_class.from_pretrained(directory, local_files_only=True, **settings)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{directory}: the image processor's configuration cannot be read ({error}). Copy it again from the "
            "checkpoint's source."
        ) from error
