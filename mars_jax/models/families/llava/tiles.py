"""Pictures of LLaVA-1.5 (arXiv 2310.03744) and variants: one tile each.

Scaling, cropping and normalising are done by transformers' numpy processor.
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from mars_jax.errors import ConfigError
from mars_jax.models.families.llava.config import LlavaConfig
from mars_jax.models.families.pictures import ImageTokens, Size, gathered, refuse_max_pixels
from mars_jax.models.families.processors import (
    ImageProcessor,
    SidedSettings,
    attempt,
    make_processor,
    read_processor,
)

_PROCESSORS = {
    "LlavaImageProcessor": "llava",
    "CLIPImageProcessor": "clip",
    "SiglipImageProcessor": "siglip",
    "BitImageProcessor": "bit",
}


@lru_cache(maxsize=8)
def tile_tokens(first: int, positions: int) -> ImageTokens:
    """The image tokens of a picture: the encoder's tokens `first` to `positions`."""
    return gathered(np.arange(first, positions), 1)


class TilePictures:
    """LLaVA's `Pictures`: tiles are `pixels` float32 [N, 3, H, W], one per picture."""

    def __init__(self, config: LlavaConfig, processor: ImageProcessor) -> None:
        self._config, self._processor = config, processor

    @property
    def rows_per_tile(self) -> int:
        """Tokens of a tile, P."""
        return self._config.vision.num_positions

    def tokens(self, sizes: Sequence[Size]) -> tuple[ImageTokens, ...]:
        """The image tokens of each picture, which do not depend on its size."""
        return (tile_tokens(int(self._config.drop_first), self.rows_per_tile),) * len(sizes)

    def tiles(self, images: Sequence[Image.Image]) -> dict[str, np.ndarray]:
        """Scaled, cropped and normalised pictures."""
        pixels = self._processor(list(images), return_tensors="np")["pixel_values"]
        return {"pixels": np.asarray(pixels, np.float32)}

    def torch_inputs(self, records: Sequence[Sequence[Image.Image]]) -> dict[str, np.ndarray]:
        """`pixel_values`."""
        return {"pixel_values": self.tiles([image for images in records for image in images])["pixels"]}

    def padding(self, count: int) -> dict[str, np.ndarray]:
        """Tiles of zeros: mean grey."""
        side = self._config.vision.image_size
        return {"pixels": np.zeros((count, 3, side, side), np.float32)}


def load_tile_pictures(directory: Path, config: LlavaConfig, max_pixels: int | None = None) -> TilePictures:
    """Reads the image processor of a checkpoint folder.

    Raises:
        ConfigError: the folder has no processor, or it is of an unsupported class or gives pictures of another size; or
            a limit of pixels is set, which would have no effect.
    """
    refuse_max_pixels(directory, config, max_pixels)
    settings, name = read_processor(directory, SidedSettings, tuple(_PROCESSORS))
    pictures = TilePictures(config, make_processor(directory, f"{_PROCESSORS[name]}.{name}", settings.given()))
    side = config.vision.image_size
    seen = attempt(directory, lambda: pictures.tiles([Image.new("RGB", (side + 3, 2 * side))])["pixels"]).shape[2:]
    if seen != (side, side):
        raise ConfigError(
            f"{directory}: the image processor makes pictures of {seen[0]} x {seen[1]} pixels, but config.json has "
            f"{side} x {side}. The files come from different checkpoints; copy both from one."
        )
    return pictures
