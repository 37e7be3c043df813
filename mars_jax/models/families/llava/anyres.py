"""Any-resolution tiling of LLaVA-OneVision: tiles of a picture, and the order of its features in the LLM's input.

Tiles are cut by transformers' numpy processor. The order of features is computed here in numpy as gather indices, from
the picture's size alone.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mars_jax.errors import ConfigError, DataError
from mars_jax.models.families.llava.config import LlavaOnevisionConfig, Pinpoints
from mars_jax.models.families.pictures import NEWLINE, ImageTokens, Size, gathered, refuse_max_pixels
from mars_jax.models.families.processors import (
    ImageProcessor,
    SidedSettings,
    attempt,
    make_processor,
    read_processor,
)

_PROCESSOR = "LlavaOnevisionImageProcessor"


class _Settings(SidedSettings):
    """The settings of LLaVA-OneVision's image processor."""

    image_grid_pinpoints: Pinpoints | None = None


@dataclass(frozen=True, slots=True)
class Geometry:
    """Settings that determine the number of tiles and tokens of a picture.

    Attributes:
        image_size: side of a tile in pixels.
        patch_size: side of a patch in pixels.
        image_grid_pinpoints: (height, width) of the canvases that pictures are fitted into, multiples of `image_size`.
        max_patches: N of `anyres_max_N`: features are scaled down if there are more than those of about N tiles.
    """

    image_size: int
    patch_size: int
    image_grid_pinpoints: tuple[tuple[int, int], ...]
    max_patches: int

    @property
    def grid_size(self) -> int:
        """Patches along one side of a tile."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """Patches of one tile, P."""
        return self.grid_size**2

    @classmethod
    def from_config(cls, config: LlavaOnevisionConfig, source: str = "config.json") -> "Geometry":
        """The geometry in a checkpoint's configuration.

        Raises:
            ConfigError: a setting is not implemented.
        """
        match = re.fullmatch(r"anyres_max_([1-9][0-9]{0,3})", config.vision_aspect_ratio)
        if match is None:
            raise ConfigError(
                f"{source}: vision_aspect_ratio is {config.vision_aspect_ratio!r}; only 'anyres_max_N' is supported."
            )
        side, pinpoints = config.vision.image_size, config.image_grid_pinpoints
        misfits = [point for point in pinpoints if point[0] % side or point[1] % side]
        if misfits:
            raise ConfigError(
                f"{source}: image_grid_pinpoints has {list(misfits[0])}; every height and width must be a multiple of "
                f"vision_config.image_size = {side}."
            )
        return cls(side, config.vision.patch_size, pinpoints, int(match.group(1)))


@lru_cache(maxsize=64)
def image_tokens(height: int, width: int, geometry: Geometry) -> ImageTokens:
    """The image tokens of a single picture.

    First the P patches of the thumbnail tile, then the rows of the fitted picture: tiles joined, padding cut off, a
    newline vector after each row. If more features remain than 1.1^2 `max_patches` tiles have, they are scaled down
    bilinearly (half-pixel centres, no antialiasing). This is the "higher AnyRes" of LLaVA-OneVision
    (arXiv 2408.03326), with the rounding of transformers' `pack_image_features`.

    Args:
        height: height of the upright picture in pixels.
        width: width of the upright picture in pixels.
        geometry: geometry of the checkpoint.

    Returns:
        Tokens with read-only arrays, shared by all pictures of the same size.

    Raises:
        DataError: the picture is so thin that no row or column of it remains.
    """
    canvas = _best_canvas(height, width, geometry.image_grid_pinpoints)
    side, patches = geometry.grid_size, geometry.num_patches
    rows, columns = canvas[0] // geometry.image_size, canvas[1] // geometry.image_size
    tiles = patches + np.arange(rows * columns * patches).reshape(rows, columns, side, side)
    grid = _unpad(tiles.transpose(0, 2, 1, 3).reshape(rows * side, columns * side), height, width)
    ratio = math.sqrt(grid.size / (geometry.max_patches * patches))
    if ratio > 1.1:
        size = int(grid.shape[0] // ratio), int(grid.shape[1] // ratio)
        if 0 in size:
            raise _too_thin(height, width)
        index, weight = _bilinear(grid, size)
    else:
        index, weight = grid[:, :, None], np.ones((*grid.shape, 1))

    corners = index.shape[-1]
    first_corner = np.eye(1, corners)[0]
    newline = np.full((index.shape[0], 1, corners), NEWLINE)
    index = np.concatenate([index, newline], axis=1).reshape(-1, corners)
    weight = np.concatenate([weight, np.broadcast_to(first_corner, newline.shape)], axis=1).reshape(-1, corners)
    thumbnail = np.broadcast_to(np.arange(patches)[:, None], (patches, corners))
    all_index = np.concatenate([thumbnail, index]).astype(np.int32)
    all_weight = np.concatenate([np.broadcast_to(first_corner, thumbnail.shape), weight]).astype(np.float32)
    all_index.setflags(write=False)
    all_weight.setflags(write=False)
    return ImageTokens(all_index, all_weight, 1 + rows * columns)


def _best_canvas(height: int, width: int, pinpoints: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """The canvas that keeps most pixels of the picture; among equals, the one with least padding."""

    def kept_and_unwasted(canvas: tuple[int, int]) -> tuple[int, int]:
        scale = min(canvas[1] / width, canvas[0] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - canvas[0] * canvas[1]

    best = max(pinpoints, key=kept_and_unwasted)
    if kept_and_unwasted(best)[0] == 0:
        raise _too_thin(height, width)
    return best


def _unpad(grid: NDArray[np.int64], height: int, width: int) -> NDArray[np.int64]:
    """Removes the rows or columns of features [rows, columns] that cover only padding."""
    rows, columns = grid.shape
    if width / height > columns / rows:
        # Rounded to 7 digits before truncation to an integer, in this order, as in transformers.
        kept = int(round(height * (columns / width), 7))
        padding = (rows - kept) // 2
        return grid[padding : rows - padding]
    kept = int(round(width * (rows / height), 7))
    padding = (columns - kept) // 2
    return grid[:, padding : columns - padding]


def _bilinear(grid: NDArray[np.int64], size: tuple[int, int]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Feature rows and weights [*size, 4] that scale `grid` down to `size`."""
    (top, bottom, down), (left, right, across) = (_linear(old, new) for old, new in zip(grid.shape, size, strict=True))
    index = np.stack([grid[np.ix_(y, x)] for y in (top, bottom) for x in (left, right)], axis=-1)
    weight = np.stack([np.outer(y, x) for y in (1 - down, down) for x in (1 - across, across)], axis=-1)
    return index, weight


def _linear(old: int, new: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Lower neighbour, upper neighbour, and weight of the upper one for each output sample, [new] each."""
    position = np.maximum((np.arange(new) + 0.5) * (old / new) - 0.5, 0.0)
    lower = np.minimum(position.astype(np.int64), old - 1)
    return lower, np.minimum(lower + 1, old - 1), position - lower


def _too_thin(height: int, width: int) -> DataError:
    return DataError(
        f"a picture of height {height} and width {width} is too thin: scaled to fit the model's tiles, nothing of it "
        "remains. Crop or pad it."
    )


@lru_cache(maxsize=8)
def _one_tile(num_patches: int) -> ImageTokens:
    """The image tokens of one of several pictures: its patches, and a newline vector."""
    return gathered(np.append(np.arange(num_patches), NEWLINE), 1)


class AnyresPictures:
    """LLaVA-OneVision's `Pictures`: tiles are `pixels` float32 [N, 3, H, W].

    The picture of a record with one picture is cut into tiles, a thumbnail first; otherwise each picture is one tile.
    """

    def __init__(self, geometry: Geometry, processor: ImageProcessor) -> None:
        self.geometry = geometry
        self._processor = processor

    @property
    def rows_per_tile(self) -> int:
        """Patches of a tile, P."""
        return self.geometry.num_patches

    def tokens(self, sizes: Sequence[Size]) -> tuple[ImageTokens, ...]:
        """The image tokens of all pictures of a record."""
        if len(sizes) == 1:
            return (image_tokens(*sizes[0], self.geometry),)
        return (_one_tile(self.geometry.num_patches),) * len(sizes)

    def tiles(self, images: Sequence[Image.Image]) -> dict[str, np.ndarray]:
        """Scaled and normalised tiles, one picture after the other."""
        by_picture = self._processor([list(images)], return_tensors="np")["pixel_values"]
        return {"pixels": np.concatenate([np.asarray(tiles, np.float32) for tiles in by_picture])}

    def torch_inputs(self, records: Sequence[Sequence[Image.Image]]) -> dict[str, np.ndarray]:
        """`pixel_values`, `image_sizes` and `batch_num_images`."""
        return dict(self._processor([list(images) for images in records], return_tensors="np"))

    def padding(self, count: int) -> dict[str, np.ndarray]:
        """Tiles of zeros: mean grey."""
        return {"pixels": np.zeros((count, 3, self.geometry.image_size, self.geometry.image_size), np.float32)}


def load_anyres_pictures(directory: Path, geometry: Geometry) -> AnyresPictures:
    """Reads the image processor of a checkpoint folder.

    Raises:
        ConfigError: the folder has no processor, or its settings differ from `geometry`.
    """
    settings, _ = read_processor(directory, _Settings, (_PROCESSOR,))
    processor = make_processor(directory, f"llava_onevision.{_PROCESSOR}", settings.given())
    pinpoints = tuple((int(height), int(width)) for height, width in processor.image_grid_pinpoints)
    pictures, side = AnyresPictures(geometry, processor), geometry.image_size
    shape = attempt(directory, lambda: pictures.tiles([Image.new("RGB", (side, side))])["pixels"]).shape
    for name, seen, expected in (
        ("image_grid_pinpoints", pinpoints, geometry.image_grid_pinpoints),
        ("size", shape[2:], (side, side)),
        ("a number of tiles (crop_size)", shape[0], pictures.tokens([(side, side)])[0].num_tiles),
    ):
        if seen != expected:
            raise ConfigError(
                f"{directory}: the image processor has {name} = {seen}, but config.json has {expected}. The files "
                "come from different checkpoints; copy both from one."
            )
    return pictures


def load_onevision_pictures(
    directory: Path, config: LlavaOnevisionConfig, max_pixels: int | None = None
) -> AnyresPictures:
    """Reads the image processor of a checkpoint folder.

    Raises:
        ConfigError: as `load_anyres_pictures` and `Geometry.from_config`; or a limit of pixels is set, which would have
            no effect.
    """
    refuse_max_pixels(directory, config, max_pixels)
    return load_anyres_pictures(directory, Geometry.from_config(config, str(directory / "config.json")))
