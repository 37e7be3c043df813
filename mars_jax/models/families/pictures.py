"""What a family's pictures are to the rest of the pipeline: tiles for the encoder, and image tokens for the decoder.

`anyres`, `tiles` and `windows` implement it. Everything follows from picture sizes, in numpy: the jitted model never
sees a data-dependent shape.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Size = tuple[int, int]
"""Height and width in pixels of an upright picture."""

NEWLINE = -1
"""In `ImageTokens.index`: the learned vector that ends a row of features. Its real row depends on the padded batch."""

ENCODER_INPUTS = ("pixels", "patch_positions", "patch_images")
"""The arrays of an example that only the vision encoder reads."""


@dataclass(frozen=True, slots=True)
class ImageTokens:
    """The image tokens of one picture, in order, each a weighted sum of C feature rows.

    Attributes:
        index: int32 [T, C], rows of the features of its own tiles, or NEWLINE.
        weight: float32 [T, C], rows sum to 1. C is 1, or 4 where the features are scaled down bilinearly.
        num_tiles: tiles the picture is cut into, N.
        grid: rows and columns in which the tokens stand, where the decoder's positions have such axes.
    """

    index: NDArray[np.int32]
    weight: NDArray[np.float32]
    num_tiles: int
    grid: tuple[int, int] | None = None


def gathered(index: NDArray[Any], num_tiles: int, grid: tuple[int, int] | None = None) -> ImageTokens:
    """Image tokens that are rows [T] of the features as they are; read-only arrays, to be shared."""
    rows, weight = index.astype(np.int32)[:, None], np.ones((len(index), 1), np.float32)
    rows.setflags(write=False)
    weight.setflags(write=False)
    return ImageTokens(rows, weight, num_tiles, grid)


class Pictures(Protocol):
    """How pictures of a checkpoint become tiles and image tokens."""

    @property
    def rows_per_tile(self) -> int:
        """Feature rows that a tile gives."""
        ...

    def tokens(self, sizes: Sequence[Size]) -> tuple[ImageTokens, ...]:
        """The image tokens of all pictures of a record.

        Raises:
            DataError: a picture that is too thin.
        """
        ...

    def tiles(self, images: Sequence[Image.Image]) -> dict[str, NDArray[Any]]:
        """What the encoder takes of all pictures of a record, by the name in a batch, arrays [N, ...]."""
        ...

    def torch_inputs(self, records: Sequence[Sequence[Image.Image]]) -> dict[str, NDArray[Any]]:
        """What transformers' model takes of the pictures of several records, as its processor makes it."""
        ...

    def padding(self, count: int) -> dict[str, NDArray[Any]]:
        """What `tiles` gives, for `count` tiles without a picture."""
        ...


def rotary_positions(length: int, places: NDArray[np.int64], pictures: Sequence[ImageTokens]) -> NDArray[np.int32]:
    """Positions int32 [T, 3] (time, row, column) of tokens: M-RoPE of Qwen2-VL (arXiv 2409.12191).

    Text goes on along all axes together. The tokens of a picture share one time and stand in its rows and columns; what
    follows begins after the longer side.

    Args:
        length: T.
        places: int [I], where image tokens are, those of all pictures in order.
        pictures: the pictures, with their grids.
    """
    positions = np.zeros((length, 3), np.int32)
    token, following = 0, 0
    starts = np.cumsum([0, *(len(picture.index) for picture in pictures)])
    for start, picture in zip(starts, pictures, strict=False):
        rows, columns = picture.grid or (1, len(picture.index))
        first = int(places[start])
        positions[token:first] = following + np.arange(first - token)[:, None]
        following += first - token
        row, column = np.divmod(np.arange(rows * columns), columns)
        positions[first : first + rows * columns] = following + np.stack([np.zeros_like(row), row, column], axis=1)
        token, following = first + rows * columns, following + max(rows, columns)
    positions[token:] = following + np.arange(length - token)[:, None]
    return positions
