"""transformers' numpy image processors of a checkpoint folder (no torch, no torchvision)."""

import json
from pathlib import Path
from typing import Any

from mars_jax.errors import ConfigError

_FILES = ("preprocessor_config.json", "processor_config.json")


def load_processor(processor_class: Any, directory: Path, **settings: Any) -> Any:
    """The folder's image processor, an instance of `processor_class`, with some settings changed.

    Raises:
        ConfigError: the folder has none, or one that can't be read.
    """
    _check_there(directory)
    try:
        return processor_class.from_pretrained(directory, local_files_only=True, **settings)
    except (OSError, ValueError) as error:
        raise _unreadable(directory, error) from error


def processor_type(directory: Path) -> str:
    """The class that the folder's image processor was saved by.

    Raises:
        ConfigError: the folder has none, one that can't be read, or one without its class.
    """
    _check_there(directory)
    file = next(directory / name for name in _FILES if (directory / name).is_file())
    try:
        settings = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise _unreadable(directory, error) from error
    nested = settings.get("image_processor", settings)
    return str(nested.get("image_processor_type") or nested.get("feature_extractor_type"))


def _check_there(directory: Path) -> None:
    if not any((directory / name).is_file() for name in _FILES):
        raise ConfigError(
            f"{directory} has neither {_FILES[0]} nor {_FILES[1]}. Copy it from the checkpoint's source: it says how "
            "the vision encoder expects pictures scaled and normalised."
        )


def _unreadable(directory: Path, error: Exception) -> ConfigError:
    return ConfigError(
        f"{directory}: the image processor's configuration cannot be read ({error}). Copy it again from the "
        "checkpoint's source."
    )
