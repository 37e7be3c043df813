"""Pictures of a row: paths, `data:` URIs, base64 texts, and the {"bytes", "path"} of parquet. None is opened here."""

import base64
from collections.abc import Iterator, Mapping
from pathlib import PureWindowsPath

from mars_jax.data.formats.base import FaultError
from mars_jax.data.values import is_absent
from mars_jax.runtime.text import json_type, short

# How the base64 texts of JPEG, PNG, WebP and GIF files begin; VLMEvalKit's tables hold pictures like that.
_PNG = "iVBORw0KGgo"
_BASE64 = ("/9j/", "UklGR", "R0lGOD")
_SHORTEST_BASE64 = 40


def column_pictures(row: Mapping[str, object], faults: list[str]) -> Iterator[str | bytes]:
    """Pictures of the columns `image` and `images`, each a source or a list of sources; faults are appended."""
    for key in ("image", "images"):
        value = row.get(key)
        if is_absent(value):
            continue
        for source in value if isinstance(value, list) else [value]:
            try:
                yield read_picture(source)
            except FaultError as error:
                faults += error.args


def read_picture(source: object) -> str | bytes:
    """The path of a picture as it is written, or the encoded picture.

    Raises:
        FaultError: the source is neither.
    """
    given = source
    if isinstance(source, dict):
        held = source.get("bytes")
        if isinstance(held, bytes):
            return bytes(held)
        if isinstance(held, str) and held:
            return _decoded(held, held)
        source = source.get("path")
    if not isinstance(source, str) or not source:
        seen = given if source is None else source
        kind = "" if seen is None else f" ({json_type(seen)})"
        hint = " Of an object, 'path' or 'bytes' is read." if isinstance(seen, dict) else ""
        raise FaultError(f"image is {short(seen)}{kind}; a path relative to the image folder is expected.{hint}")
    if source.startswith("data:"):
        return _decoded(source.partition(",")[2], source)
    is_long = len(source) >= _SHORTEST_BASE64
    if (source.startswith(_PNG) or (source.startswith(_BASE64) and is_long)) and "." not in source:
        return _decoded(source, source)
    scheme = source[:8].lower()
    if scheme.startswith(("http://", "https://", "ftp://", "s3://", "gs://", "hf://")):
        raise FaultError(f"image {short(source)} is an address. Download the picture and give its path.")
    if scheme.startswith("file:"):
        raise FaultError(f"image {short(source)} is an address of a file. Give its path alone.")
    if "\0" in source:
        raise FaultError(f"image {short(source)} holds a NUL character, which no path can. Write the path anew.")
    windows = PureWindowsPath(source)
    if windows.drive or ("\\" in source and ".." in windows.parts):
        raise FaultError(f"image {short(source)} points outside the image folder. Use a path below it, without '..'.")
    return source


def _decoded(text: str, source: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except ValueError as error:
        raise FaultError(f"image {short(source)} is no base64 ({error}). Encode it again.") from None
