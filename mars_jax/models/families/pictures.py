"""Interface of picture preprocessing: tiles for the encoder, and image tokens for the decoder.

Every family implements `Pictures`. Shapes and indices are computed in numpy from picture sizes, so the jitted model has
no data-dependent shapes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mars_jax.errors import ConfigError
from mars_jax.models.configs import ModelConfig

Size = tuple[int, int]
"""Height and width in pixels of an upright picture."""

PICTURE_NUMBERS = "patch_images"
"""Name of an optional encoder input: the index of each patch's picture in its record, int32 [N, P], from 0, -1 for
padding. Packing renumbers the pictures of a row; other encoder inputs are unchanged."""

NEWLINE = -1
"""Marker in `ImageTokens.index` of the learned vector that ends a row of features.

Its row in the features depends on the padded batch.
"""


@dataclass(frozen=True, slots=True)
class ImageTokens:
    """The image tokens of one picture, in order, each a weighted sum of C feature rows.

    Attributes:
        index: int32 [T, C], feature rows among those of the picture's tiles, or NEWLINE.
        weight: float32 [T, C], each row sums to 1. C is 1, or 4 if the features are scaled down bilinearly.
        num_tiles: number of tiles of the picture, N.
        grid: rows and columns of the tokens, if the decoder's positions have these axes.
    """

    index: NDArray[np.int32]
    weight: NDArray[np.float32]
    num_tiles: int
    grid: tuple[int, int] | None = None


def gathered(index: np.ndarray, num_tiles: int, grid: tuple[int, int] | None = None) -> ImageTokens:
    """Image tokens that each equal one feature row, given by index [T]; the arrays are read-only, to be shared."""
    rows, weight = index.astype(np.int32)[:, None], np.ones((len(index), 1), np.float32)
    rows.setflags(write=False)
    weight.setflags(write=False)
    return ImageTokens(rows, weight, num_tiles, grid)


class Pictures(Protocol):
    """Converts pictures to tiles and image tokens, as a checkpoint's image processor does."""

    @property
    def rows_per_tile(self) -> int:
        """Number of feature rows of a tile."""
        ...

    def tokens(self, sizes: Sequence[Size]) -> tuple[ImageTokens, ...]:
        """The image tokens of all pictures of a record, from their sizes.

        Raises:
            DataError: a picture is too thin.
        """
        ...

    def tiles(self, images: Sequence[Image.Image]) -> dict[str, np.ndarray]:
        """The encoder inputs of all pictures of a record: name in a batch -> array [N, ...].

        The names are the family's `encoder_inputs`; `pixels` is one of them.
        """
        ...

    def torch_inputs(self, records: Sequence[Sequence[Image.Image]]) -> dict[str, np.ndarray]:
        """The picture inputs of transformers' model for several records, as its processor computes them."""
        ...

    def padding(self, count: int) -> dict[str, np.ndarray]:
        """The arrays of `tiles` for `count` padding tiles."""
        ...


def refuse_max_pixels(directory: Path, config: ModelConfig, max_pixels: int | None) -> None:
    """Raises if a limit of pixels is set, for families with tiles of one size.

    Raises:
        ConfigError: there is a limit.
    """
    if max_pixels is not None:
        raise ConfigError(
            f"data.max_pixels is {max_pixels}, but {directory / 'config.json'} is of {config.family}, whose tiles have "
            "one size whatever the picture's. Leave it out."
        )


def rotary_positions(
    length: int, image_positions: NDArray[np.int64], pictures: Sequence[ImageTokens]
) -> NDArray[np.int32]:
    """Rotary positions (time, row, column) of a sequence: M-RoPE of Qwen2-VL (arXiv 2409.12191).

    Text advances all axes together. The tokens of a picture share one time, and have its rows and columns; the
    following text starts after the longer side.

    Args:
        length: number of tokens, T.
        image_positions: indices of the image tokens in the sequence, int [I], of all pictures in order.
        pictures: the image tokens of each picture, with their grids.

    Returns:
        int32 [T, 3].
    """
    positions = np.zeros((length, 3), np.int32)
    token, following = 0, 0
    starts = np.cumsum([0, *(len(picture.index) for picture in pictures)])
    for start, picture in zip(starts, pictures, strict=False):
        rows, columns = picture.grid or (1, len(picture.index))
        first = int(image_positions[start])
        positions[token:first] = following + np.arange(first - token)[:, None]
        following += first - token
        row, column = np.divmod(np.arange(rows * columns), columns)
        positions[first : first + rows * columns] = following + np.stack([np.zeros_like(row), row, column], axis=1)
        token, following = first + rows * columns, following + max(rows, columns)
    positions[token:] = following + np.arange(length - token)[:, None]
    return positions
