"""Loads transformers' numpy image processors, without torch and torchvision."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from mars_jax.errors import ConfigError

_FILES = ("preprocessor_config.json", "processor_config.json")


class ImageProcessor(Protocol):
    """An image processor of transformers, as the families call it."""

    def __call__(
        self, images: Sequence[Image.Image] | Sequence[Sequence[Image.Image]], *, return_tensors: str
    ) -> Mapping[str, np.ndarray]:
        """Maps pictures, or the pictures of each record, to arrays; `return_tensors` is "np"."""
        ...


def load_processor(processor_class: Any, directory: Path, **settings: int) -> Any:
    """Loads the image processor of a checkpoint folder.

    Args:
        processor_class: its class in transformers.
        directory: the folder.
        **settings: settings that replace those in the folder.

    Returns:
        An instance of `processor_class`.

    Raises:
        ConfigError: the folder has no image processor, or its configuration cannot be read.
    """
    _check_there(directory)
    try:
        return processor_class.from_pretrained(directory, local_files_only=True, **settings)
    except (OSError, ValueError) as error:
        raise _unreadable(directory, error) from error


def processor_type(directory: Path) -> str:
    """Name of the class that saved the image processor of a folder.

    Raises:
        ConfigError: the folder has no image processor, or its configuration cannot be read.
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
            f"{directory} has neither {_FILES[0]} nor {_FILES[1]}. Copy it from the checkpoint's source: it holds "
            "the vision encoder's scaling and normalisation of pictures."
        )


def _unreadable(directory: Path, error: Exception) -> ConfigError:
    return ConfigError(
        f"{directory}: the image processor's configuration cannot be read ({error}). Copy it again from the "
        "checkpoint's source."
    )
