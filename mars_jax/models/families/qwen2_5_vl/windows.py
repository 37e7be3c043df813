"""Windows and image tokens of pictures of any size, for Qwen2.5-VL's encoder (arXiv 2502.13923).

transformers' numpy processor scales, normalises and cuts pictures into patches; this module assigns the patches to
windows. Every window is padded to one size, so that a picture is a whole number of tiles.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from mars_jax.errors import ConfigError, DataError
from mars_jax.models.families.pictures import ImageTokens, Size, gathered
from mars_jax.models.families.processors import (
    Edge,
    Pixels,
    ProcessorSettings,
    attempt,
    make_processor,
    read_processor,
)
from mars_jax.models.families.qwen2_5_vl.config import Qwen25VlConfig, QwenVisionConfig
from mars_jax.runtime.json_object import Settings

_MAX_ASPECT_RATIO = 200
_PROCESSORS = ("Qwen2VLImageProcessor", "Qwen2_5_VLImageProcessor")
_MIN_PIXELS, _MAX_PIXELS = 56 * 56, 28 * 28 * 1280  # transformers' defaults


class _Size(Settings):
    """Bounds of pixels; transformers 4.45 to 4.49 saved the last two."""

    shortest_edge: Pixels | None = None
    longest_edge: Pixels | None = None
    min_pixels: Pixels | None = None
    max_pixels: Pixels | None = None


class _Settings(ProcessorSettings):
    """The settings of Qwen2.5-VL's image processor."""

    do_resize: Literal[True] | None = None
    size: _Size | None = None
    min_pixels: Pixels | None = None
    max_pixels: Pixels | None = None
    patch_size: Edge = 14
    temporal_patch_size: Edge = 2
    merge_size: Edge = 2

    def bounds(self) -> tuple[int | None, int | None]:
        """Least and most pixels of a picture; the keys at the top level come first, as in transformers."""
        if self.size is None:
            return self.min_pixels or _MIN_PIXELS, self.max_pixels or _MAX_PIXELS
        least = self.min_pixels or self.size.shortest_edge or self.size.min_pixels
        return least, self.max_pixels or self.size.longest_edge or self.size.max_pixels


@dataclass(frozen=True, slots=True)
class WindowGeometry:
    """Settings that determine the number of windows and tokens of a picture.

    Attributes:
        patch_size: side of a patch in pixels.
        merge_size: patches along a side of a group; a group is an image token.
        window_groups: groups along a side of a window.
        min_pixels: pictures with fewer pixels are scaled up to at least as many.
        max_pixels: pictures with more pixels are scaled down to at most as many.
    """

    patch_size: int
    merge_size: int
    window_groups: int
    min_pixels: int
    max_pixels: int

    def grid(self, size: Size) -> tuple[int, int]:
        """Rows and columns of groups of a picture, after scaling to whole groups with transformers' rounding.

        Raises:
            DataError: a side is more than 200 times the other.
        """
        (height, width), side = size, self.patch_size * self.merge_size
        if max(size) > _MAX_ASPECT_RATIO * min(size):
            raise DataError(
                f"a picture of height {height} and width {width} is too thin: one side may be {_MAX_ASPECT_RATIO} "
                "times the other at most. Crop or pad it."
            )
        rows, columns = round(height / side), round(width / side)
        pixels = rows * columns * side**2
        if pixels > self.max_pixels:
            shrink = math.sqrt(height * width / self.max_pixels)
            return max(1, math.floor(height / shrink / side)), max(1, math.floor(width / shrink / side))
        if pixels < self.min_pixels:
            grow = math.sqrt(self.min_pixels / (height * width))
            return math.ceil(height * grow / side), math.ceil(width * grow / side)
        return rows, columns


@lru_cache(maxsize=64)
def window_tokens(grid: tuple[int, int], window_groups: int) -> ImageTokens:
    """The image tokens of a picture: the feature row of each group in its window.

    Windows are numbered row by row, and so are the groups of a window; groups outside the picture are padding.

    Args:
        grid: rows and columns of groups.
        window_groups: groups along a side of a window.

    Returns:
        Tokens with read-only arrays; feature row `n * window_groups^2 + g` is group g of window n.
    """
    rows, columns = grid
    across = -(-columns // window_groups)
    row, column = np.divmod(np.arange(rows * columns), columns)
    window = (row // window_groups) * across + column // window_groups
    group = (row % window_groups) * window_groups + column % window_groups
    return gathered(window * window_groups**2 + group, across * -(-rows // window_groups), grid)


class WindowPictures:
    """Qwen2.5-VL's `Pictures`. Tiles are windows of P patches:

    pixels           float32 [N, P, values]  values of a patch: channel, frame, row, column
    patch_positions  int32   [N, P, 2]       row and column of the patch in its picture
    patch_images     int32   [N, P]          index of its picture in the record, -1 for padding
    """

    def __init__(self, config: QwenVisionConfig, processor: Any) -> None:
        self._config, self._processor = config, processor
        limits = processor.size
        self.geometry = WindowGeometry(
            config.patch_size, config.merge_size, config.window_groups, limits["shortest_edge"], limits["longest_edge"]
        )

    @property
    def rows_per_tile(self) -> int:
        """Groups of a window."""
        return self.geometry.window_groups**2

    def tokens(self, sizes: Sequence[Size]) -> tuple[ImageTokens, ...]:
        """The image tokens of each picture, which do not depend on the other pictures."""
        return tuple(window_tokens(self.geometry.grid(size), self.geometry.window_groups) for size in sizes)

    def tiles(self, images: Sequence[Image.Image]) -> dict[str, np.ndarray]:
        """Windows of all pictures, one picture after the other."""
        parts = [self._windows(number, image) for number, image in enumerate(images)]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def torch_inputs(self, records: Sequence[Sequence[Image.Image]]) -> dict[str, np.ndarray]:
        """`pixel_values` and `image_grid_thw`."""
        return dict(self._processor([image for images in records for image in images], return_tensors="np"))

    def padding(self, count: int) -> dict[str, np.ndarray]:
        """Windows without a patch."""
        patches = self._config.num_patches
        return {
            "pixels": np.zeros((count, patches, self._config.patch_values), np.float32),
            "patch_positions": np.zeros((count, patches, 2), np.int32),
            "patch_images": np.full((count, patches), -1, np.int32),
        }

    def _windows(self, number: int, image: Image.Image) -> dict[str, np.ndarray]:
        processed = self._processor([image], return_tensors="np")
        merge = self._config.merge_size
        _, height, width = processed["image_grid_thw"][0].tolist()
        tokens = window_tokens((height // merge, width // merge), self.geometry.window_groups)
        row, column = np.divmod(np.arange(len(tokens.index)), width // merge)
        down, across = np.divmod(np.arange(merge**2), merge)
        # The processor returns patches group by group, in the order of the merger.
        slots = (tokens.index * merge**2 + np.arange(merge**2)[None]).reshape(-1)
        rows, columns = row[:, None] * merge + down[None], column[:, None] * merge + across[None]
        positions = np.stack([rows, columns], axis=-1).reshape(-1, 2)
        windows = self.padding(tokens.num_tiles)
        arrays = {"pixels": processed["pixel_values"], "patch_positions": positions, "patch_images": number}
        for name, values in arrays.items():
            windows[name].reshape(-1, *windows[name].shape[2:])[slots] = values
        return windows


def load_window_pictures(directory: Path, config: Qwen25VlConfig, max_pixels: int | None = None) -> WindowPictures:
    """Reads the image processor of a checkpoint folder (no torch, no torchvision).

    Args:
        directory: the folder.
        config: the architecture.
        max_pixels: limit of pixels per picture; None: the limit in the folder.

    Raises:
        ConfigError: the folder has no processor, its patches differ from the model's, or `max_pixels` is below its
            smallest picture.
    """
    settings, _ = read_processor(directory, _Settings, _PROCESSORS)
    least, most = settings.bounds()
    if least is None or most is None or least > most:
        raise ConfigError(
            f"{directory}: the image processor's size is {least} to {most} pixels; shortest_edge and longest_edge "
            "(or min_pixels and max_pixels) in this order are expected. Copy its configuration from the checkpoint's "
            "source."
        )
    if max_pixels is not None and max_pixels < least:
        raise ConfigError(
            f"data.max_pixels is {max_pixels}, but the image processor in {directory} enlarges every picture to "
            f"{least} pixels at least. Give at least as many."
        )
    size = {"shortest_edge": least, "longest_edge": max_pixels or most}
    given = {key: value for key, value in settings.given().items() if key not in ("min_pixels", "max_pixels")}
    processor = make_processor(directory, f"qwen2_vl.{_PROCESSORS[0]}", given | {"size": size})
    vision = config.vision
    for name, expected in (
        ("patch_size", vision.patch_size),
        ("merge_size", vision.merge_size),
        ("temporal_patch_size", vision.temporal_patch_size),
    ):
        if getattr(settings, name) != expected:
            raise ConfigError(
                f"{directory}: the image processor has {name} = {getattr(settings, name)}, but config.json has "
                f"{expected}. The files come from different checkpoints; copy both from one."
            )
    pictures = WindowPictures(vision, processor)
    side = vision.patch_size * vision.merge_size
    attempt(directory, lambda: pictures.tiles([Image.new("RGB", (side, side))]))
    return pictures
