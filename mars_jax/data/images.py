"""Pictures to tiles, and the order in which an image's features enter the LLM (LLaVA-OneVision's "anyres" tiling).

Reading is Pillow, tiling is transformers' numpy processor. The order of features is worked out here in numpy, from the
image size alone, as a gather: the jitted model never sees a data-dependent shape. Nothing here runs a model.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from mars_jax.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

NEWLINE = -1
"""In `ImageTokens.index`: the learned vector that ends a row of features. Its real row depends on the padded batch."""

_SIXTEEN_BIT_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N")
_EXIF_ORIENTATION, _EXIF_ROTATED = 0x0112, (5, 6, 7, 8)
_DEFAULT_PINPOINTS = [[384 * rows, 384 * columns] for rows in range(1, 7) for columns in range(1, 7)]


def load_rgb(path: Path) -> Image.Image:
    """Decodes a picture to upright 8-bit RGB.

    The EXIF rotation is applied, 16-bit grey is scaled to 8 bits (Pillow alone would clip it to white), and
    transparency is laid on white, as transformers does at inference.

    Raises:
        DataError: floating-point pixels, whose range is not defined, or more pixels than Pillow's safety limit.
        Exception: whatever Pillow's decoder raises on a broken file; `records.load_records` turns it into a DataError.
    """
    with Image.open(path) as opened:
        _refuse_huge(opened, path)
        image = ImageOps.exif_transpose(opened)
    if image.mode == "F":
        raise DataError(f"{path}: floating-point pixels have no defined range. Save the picture with 8 or 16 bits.")
    if image.mode in _SIXTEEN_BIT_MODES:
        grey = np.clip(np.asarray(image, dtype=np.int64), 0, 65535) // 257
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def image_size(path: Path) -> tuple[int, int]:
    """Height and width in pixels of the upright picture, from its header (a PNG is decoded: its EXIF may come last)."""
    with Image.open(path) as image:
        width, height = image.size
        rotated = image.getexif().get(_EXIF_ORIENTATION) in _EXIF_ROTATED
    return (width, height) if rotated else (height, width)


def _refuse_huge(image: Image.Image, path: Path) -> None:
    width, height = image.size
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
        raise DataError(
            f"{path}: {width}x{height} pixels, over the safety limit of {limit:,} pixels. Scale the picture down."
        )


@dataclass(frozen=True, slots=True)
class Geometry:
    """What decides how many tiles and tokens a picture becomes.

    Attributes:
        image_size: side of a tile in pixels.
        patch_size: side of a patch in pixels.
        image_grid_pinpoints: (height, width) of the canvases a picture may be fitted into, multiples of `image_size`.
        max_patches: N of `anyres_max_N`: a picture of more than about N tiles' worth of features is scaled down.
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
    def from_config(cls, config: Mapping[str, Any], source: str = "config.json") -> "Geometry":
        """Reads a checkpoint's parsed `config.json`; absent keys have transformers' defaults.

        Raises:
            ConfigError: a key is missing, or has a value that this version does not implement.
        """
        strategy = config.get("vision_feature_select_strategy", "full")
        if strategy != "full":
            raise ConfigError(
                f"{source}: vision_feature_select_strategy is {strategy!r}; only 'full' is supported. Use a "
                "LLaVA-OneVision checkpoint, whose SigLIP encoder has no class token to drop."
            )
        aspect_ratio = str(config.get("vision_aspect_ratio", "anyres_max_9"))
        match = re.fullmatch(r"anyres_max_([1-9]\d*)", aspect_ratio)
        if match is None:
            raise ConfigError(f"{source}: vision_aspect_ratio is {aspect_ratio!r}; only 'anyres_max_N' is supported.")
        try:
            side, patch = int(config["vision_config"]["image_size"]), int(config["vision_config"]["patch_size"])
        except KeyError as error:
            raise ConfigError(
                f"{source}: vision_config has no {error}. Point model.checkpoint at a complete LLaVA-OneVision folder."
            ) from error
        pinpoints = tuple((int(h), int(w)) for h, w in config.get("image_grid_pinpoints") or _DEFAULT_PINPOINTS)
        odd = [point for point in pinpoints if point[0] % side or point[1] % side]
        if odd:
            raise ConfigError(
                f"{source}: image_grid_pinpoints has {list(odd[0])}; every height and width must be a multiple of "
                f"vision_config.image_size = {side}."
            )
        return cls(side, patch, pinpoints, int(match.group(1)))


@dataclass(frozen=True, slots=True)
class ImageTokens:
    """The image tokens of one picture, in order, each a weighted sum of C feature rows.

    Attributes:
        index: int32 [T, C], rows of the features [N*P, D] of its own tiles, or NEWLINE.
        weight: float32 [T, C], rows sum to 1. C is 1, or 4 where the features are scaled down bilinearly.
        num_tiles: tiles the picture is cut into, N; the first is the whole picture scaled to one tile.
    """

    index: NDArray[np.int32]
    weight: NDArray[np.float32]
    num_tiles: int


@lru_cache(maxsize=64)
def image_tokens(height: int, width: int, geometry: Geometry) -> ImageTokens:
    """Which features, in which order, a single picture of this size gives to the LLM.

    First the P patches of the thumbnail tile, then the rows of the fitted picture: tiles joined, padding cut off, a
    newline vector after each row. If more than 1.1^2 `max_patches` tiles' worth of features are left, they are scaled
    down bilinearly (half-pixel centres, no antialiasing). This is the "higher AnyRes" of
    LLaVA-OneVision (arXiv 2408.03326), with the rounding of transformers' `pack_image_features`.

    Args:
        height: pixels of the upright picture.
        width: pixels of the upright picture.
        geometry: of the checkpoint.

    Returns:
        Read-only arrays; one result is shared by all pictures of the same size.

    Raises:
        DataError: the picture is so thin that no row or column of it is left.
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
    """The canvas that keeps most of the picture's pixels, and among those the one that wastes least."""

    def kept_and_unwasted(canvas: tuple[int, int]) -> tuple[int, int]:
        scale = min(canvas[1] / width, canvas[0] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - canvas[0] * canvas[1]

    best = max(pinpoints, key=kept_and_unwasted)
    if kept_and_unwasted(best)[0] == 0:
        raise _too_thin(height, width)
    return best


def _unpad(grid: NDArray[np.int64], height: int, width: int) -> NDArray[np.int64]:
    """Cuts off the rows or columns of features [rows, columns] that only saw padding."""
    rows, columns = grid.shape
    if width / height > columns / rows:
        # Rounded to 7 digits before the cut to an integer, and in this order, because transformers does so.
        kept = int(round(height * (columns / width), 7))
        padding = (rows - kept) // 2
        return grid[padding : rows - padding]
    kept = int(round(width * (rows / height), 7))
    padding = (columns - kept) // 2
    return grid[:, padding : columns - padding]


def _bilinear(grid: NDArray[np.int64], size: tuple[int, int]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Corners and weights [*size, 4] that scale `grid` down to `size`."""
    (top, bottom, down), (left, right, across) = (_linear(old, new) for old, new in zip(grid.shape, size, strict=True))
    index = np.stack([grid[np.ix_(y, x)] for y in (top, bottom) for x in (left, right)], axis=-1)
    weight = np.stack([np.outer(y, x) for y in (1 - down, down) for x in (1 - across, across)], axis=-1)
    return index, weight


def _linear(old: int, new: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Per output sample: lower neighbour, upper neighbour, and the upper one's weight."""
    position = np.maximum((np.arange(new) + 0.5) * (old / new) - 0.5, 0.0)
    lower = np.minimum(position.astype(np.int64), old - 1)
    return lower, np.minimum(lower + 1, old - 1), position - lower


def _too_thin(height: int, width: int) -> DataError:
    return DataError(
        f"a picture of height {height} and width {width} is too thin: scaled to fit the model's tiles, nothing of it "
        "is left. Crop or pad it."
    )


def load_image_processor(directory: Path, geometry: Geometry) -> "LlavaOnevisionImageProcessorPil":
    """Loads the numpy image processor of a checkpoint folder (no torch, no torchvision).

    Raises:
        ConfigError: the folder has no processor, or one that does not cut tiles the way `geometry` counts them.
    """
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

    if not any((directory / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
        raise ConfigError(
            f"{directory} has neither preprocessor_config.json nor processor_config.json. Copy it from the "
            "checkpoint's source: it says how the vision encoder expects pictures scaled and normalised."
        )
    try:
        processor = LlavaOnevisionImageProcessorPil.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{directory}: the image processor's configuration cannot be read ({error}). Copy it again from the "
            "checkpoint's source."
        ) from error
    pinpoints = tuple((int(height), int(width)) for height, width in processor.image_grid_pinpoints)
    for name, seen, expected in (
        ("image_grid_pinpoints", pinpoints, geometry.image_grid_pinpoints),
        ("size", (processor.size["height"], processor.size["width"]), (geometry.image_size, geometry.image_size)),
    ):
        if seen != expected:
            raise ConfigError(
                f"{directory}: the image processor has {name} = {seen}, but config.json says {expected}. The files "
                "come from different checkpoints; copy both from one."
            )
    return processor


def image_pixels(image: Image.Image, processor: "LlavaOnevisionImageProcessorPil") -> NDArray[np.float32]:
    """Scaled and normalised tiles, float32 [N, 3, H, W], the thumbnail first."""
    tiles = processor([image], return_tensors="np")["pixel_values"][0]
    return np.asarray(tiles, dtype=np.float32)
