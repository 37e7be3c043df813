"""Decodes picture files to upright 8-bit RGB, independent of any model."""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from mars_jax.errors import DataError
from mars_jax.models.families.pictures import Size

_SIXTEEN_BIT_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N")
_EXIF_ORIENTATION, _EXIF_ROTATED = 0x0112, (5, 6, 7, 8)


@dataclass(frozen=True, slots=True)
class PictureBytes:
    """An encoded picture embedded in a file of samples."""

    data: bytes

    def __str__(self) -> str:
        return f"picture of {len(self.data)} bytes"


Picture = Path | PictureBytes


def open_picture(picture: Picture) -> Image.Image:
    """Opens a picture; Pillow reads its header only."""
    return Image.open(io.BytesIO(picture.data) if isinstance(picture, PictureBytes) else picture)


def load_rgb(path: Picture) -> Image.Image:
    """Decodes a picture to upright 8-bit RGB.

    The EXIF rotation is applied, 16-bit grey is scaled to 8 bits (Pillow alone would clip it to white), and
    transparency is laid on white, as transformers does at inference.

    Raises:
        DataError: floating-point pixels, whose range is not defined, or more pixels than Pillow's safety limit.
        Exception: whatever Pillow's decoder raises on a broken file; `records.load_records` turns it into a DataError.
    """
    with open_picture(path) as opened:
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


def image_size(path: Picture) -> Size:
    """Height and width in pixels of the upright picture, from its header (a PNG is decoded: its EXIF may come last)."""
    with open_picture(path) as image:
        width, height = image.size
        rotated = image.getexif().get(_EXIF_ORIENTATION) in _EXIF_ROTATED
    return (width, height) if rotated else (height, width)


def _refuse_huge(image: Image.Image, path: Picture) -> None:
    width, height = image.size
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
        raise DataError(
            f"{path}: {width}x{height} pixels, over the safety limit of {limit:,} pixels. Scale the picture down."
        )
