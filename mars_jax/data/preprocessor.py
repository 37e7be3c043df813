"""Tokenizer and image processor of a checkpoint."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mars_jax.data.tokenizer import load_tokenizer
from mars_jax.errors import ConfigError
from mars_jax.models.families.pictures import Pictures
from mars_jax.models.families.registry import family_of, model_config

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class Preprocessor:
    """Tokenizer and image processor of a checkpoint, with the settings that turn records into arrays.

    Attributes:
        tokenizer: the tokenizer, with its chat template.
        pictures: converts pictures to tiles and image tokens.
        encoder_inputs: the arrays of an example that only the vision encoder reads.
        image_token_id: the token that stands for a feature of a picture.
        axes: axes of a rotary position: 1, or 3 (time, row, column).
    """

    tokenizer: "PreTrainedTokenizerBase"
    pictures: Pictures
    encoder_inputs: tuple[str, ...]
    image_token_id: int
    axes: int = 1


def load_preprocessor(directory: Path, max_pixels: int | None = None) -> Preprocessor:
    """Reads config.json, the tokenizer and the image processor of a checkpoint folder.

    Args:
        directory: the folder.
        max_pixels: limit above which pictures are scaled down; None: the limit in the processor's file.

    Raises:
        ConfigError: a file is missing or unusable, or the family refuses a limit of pixels.
    """
    path = directory / "config.json"
    try:
        config = model_config(json.loads(path.read_text()), str(path))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error}). Point model.checkpoint at a checkpoint folder.") from error
    family = family_of(config)
    pictures = family.load_pictures(directory, config, max_pixels)
    axes = len(config.text.mrope_section or (1,))
    return Preprocessor(load_tokenizer(directory), pictures, family.encoder_inputs, config.image_token_id, axes)
