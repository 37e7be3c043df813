"""Decodes picture files to upright 8-bit RGB, independent of any model, within bounds of time and memory.

Pillow is given the formats to try, none of which starts a program (its EPS reader does). Pictures are regular files of
at most `MAX_BYTES` and `MAX_PIXELS`. Threads wait for each other so that at most `MAX_PIXELS` are decoded at a time in
this process. Measured as the growth of a process's peak of memory by `load_rgb`, at 36 million pixels: 12 bytes a pixel
of a JPEG, 20 of a PNG with transparency, 28 of a WebP with it.
"""

import functools
import io
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from mars_jax.errors import DataError
from mars_jax.models.families.pictures import Size
from mars_jax.runtime.text import readable

FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "PPM")
"""Formats of pictures that are read, by Pillow's names; of several frames the first."""

MAX_PIXELS = 64_000_000
"""Pixels of one picture, and of all that are decoded at a time."""

MAX_BYTES = 2**29
"""Bytes of one picture's file."""

_SIXTEEN_BIT_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N")
_EXIF_ORIENTATION, _EXIF_ROTATED = 0x0112, (5, 6, 7, 8)


@dataclass(frozen=True, slots=True)
class PictureBytes:
    """An encoded picture embedded in a file of samples."""

    data: bytes

    def __str__(self) -> str:
        return f"picture of {len(self.data)} bytes"


Picture = Path | PictureBytes


class PictureError(DataError):
    """A picture is refused.

    Attributes:
        problem: what is wrong with it; the message begins with the picture's name.
    """

    def __init__(self, picture: Picture, problem: str) -> None:
        super().__init__(f"{_name(picture)} {problem}")
        self.problem = problem


def _check_file(path: Path) -> None:
    """Refuses what is no regular file, without opening it, and a file too large for a picture."""
    facts = path.stat()
    if not stat.S_ISREG(facts.st_mode):
        raise PictureError(path, f"is {kind_of_file(facts.st_mode)}, not a file. Give the picture's file.")
    if facts.st_size > MAX_BYTES:
        raise PictureError(path, f"has {facts.st_size:,} bytes, more than {MAX_BYTES:,}. Scale the picture down.")


def kind_of_file(mode: int) -> str:
    """What a file that is not a regular one is, in words."""
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def open_picture(picture: Picture) -> Image.Image:
    """Opens a picture; Pillow reads its header only.

    Raises:
        PictureError: it is no regular file, or none of `FORMATS`, or over a limit.
        OSError: it cannot be read.
    """
    if isinstance(picture, Path):
        _check_file(picture)
    try:
        file = io.BytesIO(picture.data) if isinstance(picture, PictureBytes) else picture
        image = Image.open(file, formats=_formats())
    except Image.UnidentifiedImageError:
        formats = ", ".join(FORMATS)
        raise PictureError(
            picture, f"cannot be decoded: it is no picture in one of the formats {formats}. Replace or convert it."
        ) from None
    width, height = image.size
    if width * height > MAX_PIXELS:
        image.close()
        raise PictureError(
            picture, f"has {width}x{height} pixels, over the safety limit of {MAX_PIXELS:,} pixels. Scale it down."
        )
    return image


def load_rgb(path: Picture) -> Image.Image:
    """Decodes a picture to upright 8-bit RGB.

    The EXIF rotation is applied, 16-bit grey is scaled to 8 bits (Pillow alone would clip it to white), and
    transparency is laid on white, as transformers does at inference.

    Raises:
        PictureError: see `open_picture`; or floating-point pixels, whose range is not defined.
        Exception: whatever Pillow's decoder raises on a broken file; `records.load_records` turns it into a DataError.
    """
    with open_picture(path) as opened, _WORK.taken(opened.width * opened.height):
        return _rgb(ImageOps.exif_transpose(opened), path)


def _rgb(image: Image.Image, path: Picture) -> Image.Image:
    if image.mode == "F":
        raise PictureError(path, "has floating-point pixels, which have no defined range. Save it with 8 or 16 bits.")
    if image.mode in _SIXTEEN_BIT_MODES:
        grey = np.clip(np.asarray(image, dtype=np.int32), 0, 65535) // 257
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def image_size(path: Picture) -> Size:
    """Height and width in pixels of the upright picture, from its header.

    A PNG is decoded, since its EXIF may come last, and so is a rotated TIFF, whose header Pillow may turn itself.
    """
    with open_picture(path) as image, _WORK.taken(image.width * image.height):
        width, height = image.size
        if image.getexif().get(_EXIF_ORIENTATION) not in _EXIF_ROTATED:
            return height, width
        if image.format == "TIFF":
            width, height = ImageOps.exif_transpose(image).size
            return height, width
        return width, height


def _name(picture: Picture) -> str:
    return readable(str(picture), 300)


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


class _Work:
    """Pixels that are being decoded; threads wait for their share, of which each takes one at a time."""

    def __init__(self, limit: int) -> None:
        self._free = self._limit = limit
        self._changed = threading.Condition()

    @contextmanager
    def taken(self, pixels: int) -> Iterator[None]:
        pixels = min(pixels, self._limit)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= pixels)
            self._free -= pixels
        try:
            yield
        finally:
            with self._changed:
                self._free += pixels
                self._changed.notify_all()


_WORK = _Work(MAX_PIXELS)
