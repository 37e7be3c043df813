"""Tokenizer and image processor of a checkpoint."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from mars_jax.data.template import load_tokenizer
from mars_jax.errors import ConfigError
from mars_jax.models.families.llava.anyres import Geometry, load_anyres_pictures
from mars_jax.models.families.llava.config import LlavaConfig, LlavaOnevisionConfig
from mars_jax.models.families.llava.tiles import load_tile_pictures
from mars_jax.models.families.pictures import Pictures
from mars_jax.models.families.qwen2_5_vl.config import Qwen25VlConfig
from mars_jax.models.families.qwen2_5_vl.windows import load_window_pictures
from mars_jax.models.families.registry import model_config

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class Preprocessor:
    """What of a checkpoint turns records into numbers.

    Attributes:
        tokenizer: with its chat template.
        pictures: how pictures become tiles and image tokens.
        image_token_id: the token that stands for a feature of a picture.
        axes: of a rotary position: 1, or 3 (time, row, column).
    """

    tokenizer: "PreTrainedTokenizerBase"
    pictures: Pictures
    image_token_id: int
    axes: int = 1


def load_preprocessor(directory: Path, max_pixels: int | None = None) -> Preprocessor:
    """Reads config.json, the tokenizer and the image processor of a checkpoint folder.

    Args:
        directory: the folder.
        max_pixels: of a picture, larger ones are scaled down; None for what the processor's file says.

    Raises:
        ConfigError: a file is missing or unusable, or a limit that the family doesn't know.
    """
    path = directory / "config.json"
    try:
        config = model_config(json.loads(path.read_text()), str(path))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error}). Point model.checkpoint at a checkpoint folder.") from error
    pictures: Pictures
    if isinstance(config, Qwen25VlConfig):
        pictures = load_window_pictures(directory, config.vision, max_pixels)
    elif max_pixels is not None:
        raise ConfigError(
            f"data.max_pixels is {max_pixels}, but {path} is of {config.family}, whose tiles have one size whatever "
            f"the picture's. Leave it out."
        )
    elif isinstance(config, LlavaOnevisionConfig):
        pictures = load_anyres_pictures(directory, Geometry.from_config(config, str(path)))
    else:
        pictures = load_tile_pictures(directory, cast(LlavaConfig, config))
    axes = len(config.text.mrope_section or (1,))
    return Preprocessor(load_tokenizer(directory), pictures, config.image_token_id, axes)
