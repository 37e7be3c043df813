"""JSON files: documents written atomically, and JSON Lines files that survive a killed writer.

Floats keep all their digits; NaN and infinities, which JSON lacks, become null.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, TypeAdapter, ValidationError
from pydantic_core import from_json  # the parser of `TypeAdapter`: what it refuses is refused before the types are

from mars_jax.errors import DataError
from mars_jax.runtime.durable import make_folder, naming, refuse_special, replacing
from mars_jax.runtime.faults import location_of
from mars_jax.runtime.text import json_type, short

T = TypeVar("T")

Document = dict[str, Any]
"""A JSON object."""

_WRITE_AGAIN = "Delete it, and run the command that writes it again."
_MEND = "Mend or delete the line."


def number_or_nan(value: float | None) -> float:
    """A number as `dump_json` wrote it: null stands for NaN and infinities."""
    return math.nan if value is None else value


FloatOrNan = Annotated[float, BeforeValidator(number_or_nan)]
"""A number of a dataclass that `load_json` reads by `number_or_nan`."""


def dump_json(value: object, indent: int | None = None, ascii: bool = False) -> str:
    """JSON text of a value, keys in their own order; paths become text, arrays lists, their scalars numbers.

    Args:
        value: what is written.
        indent: spaces of a level; None: all on one line.
        ascii: write other characters as escapes, for streams of any encoding and terminals.
    """
    return json.dumps(_plain(value), indent=indent, ensure_ascii=ascii, allow_nan=False)


def write_text(path: Path, text: str, *, synced: bool = True) -> None:
    """Writes a text file atomically: a reader, or a run after a crash, sees the old text or the new one.

    Args:
        path: of the file.
        text: its content.
        synced: whether it must outlast a power cut from now on.
    """
    with replacing(path, synced=synced) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")


def write_json(path: Path, value: object, *, synced: bool = True) -> None:
    """Writes one JSON document atomically; `synced` as in `write_text`."""
    write_text(path, dump_json(value, indent=2) + "\n", synced=synced)


def read_json(path: Path, schema: type | None = None) -> Any:
    """Reads a JSON document as it is.

    Args:
        path: of the file.
        schema: a dataclass with the keys that the caller reads and their types; other keys may be there.

    Raises:
        DataError: the file can't be read, isn't JSON, or isn't of the schema.
    """
    content, value = _read(path)
    if schema:
        _checked(content, value, schema, str(path), _WRITE_AGAIN)
    return value


def load_json(path: Path, kind: type[T]) -> T:
    """Reads a JSON document as an object of a dataclass.

    Raises:
        DataError: as `read_json`.
    """
    found: T = _checked(*_read(path), kind, str(path), _WRITE_AGAIN)
    return found


def _read(path: Path) -> tuple[bytes, Any]:
    """The content of a file, and the value that it is the JSON of."""
    content = _read_bytes(path)
    try:
        value = from_json(content)
    except ValueError as error:
        what = "is empty, not JSON" if not content.strip() else f"is not JSON: {error}"
        raise DataError(f"{path} {what}. {_WRITE_AGAIN}") from None
    return content, value


def append_jsonl(path: Path, *records: Mapping[str, object]) -> None:
    """Appends records as lines, all by one call, after cutting off an incomplete last line of a killed writer."""
    make_folder(path.parent)
    lines = _jsonl(records).encode()
    with naming(path), path.open("a+b") as file:
        end = file.tell()
        if end:
            file.seek(end - 1)
            if file.read(1) != b"\n":
                file.seek(0)
                content = file.read()
                start = content.rfind(b"\n") + 1
                if not _is_record(content[start:]):
                    file.truncate(start)
                else:
                    lines = b"\n" + lines
        file.write(lines)


def write_jsonl(path: Path, records: Iterable[Mapping[str, object]]) -> None:
    """Writes a JSON Lines file atomically, as one that is written whole."""
    write_text(path, _jsonl(records))


def read_jsonl(path: Path, warn: Callable[[str], None], schema: type | None = None) -> list[Document]:
    """Reads the records of a JSON Lines file as they are; none if the file is absent.

    Args:
        path: the file.
        warn: called with a message where the last line is incomplete, as after a kill, and is left out.
        schema: a dataclass as in `read_json`, of every line.

    Raises:
        DataError: the file can't be read, or another line isn't a JSON object or isn't of the schema.
    """
    records = []
    for where, line, record in _lines(path, warn):
        if schema:
            _checked(line, record, schema, where, _MEND)
        records.append(record)
    return records


def load_jsonl(path: Path, warn: Callable[[str], None], kind: type[T]) -> list[T]:
    """Reads the lines of a JSON Lines file as objects of a dataclass; none if the file is absent.

    Raises:
        DataError: as `read_jsonl`.
    """
    return [_checked(line, record, kind, where, _MEND) for where, line, record in _lines(path, warn)]


def _lines(path: Path, warn: Callable[[str], None]) -> Iterator[tuple[str, bytes, Document]]:
    """The place of each line, the line, and its record."""
    # A file in the place of its folder is no absent file.
    if not path.exists() and (path.parent.is_dir() or not path.parent.exists()):
        return
    lines = _read_bytes(path).split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = from_json(line)
        except ValueError:
            if number == len(lines):
                warn(f"{where}: incomplete, as after a kill, and left out")
                return
            record = None
        if not isinstance(record, dict):
            raise DataError(f"{where}: not a JSON object: {line[:80].decode(errors='replace')!r}. Delete the line.")
        yield where, line, record


def _read_bytes(path: Path) -> bytes:
    refuse_special(path)
    try:
        return path.read_bytes()
    except IsADirectoryError:
        raise DataError(f"{path} is a folder where a file belongs. Move it away, and run the command again.") from None
    except NotADirectoryError:
        raise DataError(f"can't read {path}: a file lies where one of its folders belongs. Move it away.") from None
    except OSError as error:
        raise DataError(f"can't read {path}: {error.strerror}. Run the command that writes it.") from None


def _checked(content: bytes, value: object, kind: type, where: str, remedy: str) -> Any:
    """The object of a dataclass that a value, read from some JSON, stands for; refused by the first key that is wrong.

    The words of the message are where it was read, and what to do.
    """
    if not isinstance(value, dict):
        raise DataError(f"{where} holds a JSON {json_type(value)} where a mapping of names is expected. {remedy}")
    try:
        return _adapter(kind).validate_json(content, strict=True)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        key = ".".join(map(str, location_of(fault, value)))
        if fault["type"] == "missing":
            raise DataError(f"{where}: {key} is missing. {remedy}") from None
        if fault["type"] == "value_error":
            raise DataError(f"{where}: {key and f'{key}: '}{fault['ctx']['error']}. {remedy}") from None
        must = fault["msg"].removeprefix("Input should be ")
        raise DataError(f"{where}: {key} is {short(fault['input'])} but must be {must}. {remedy}") from None


@cache
def _adapter(kind: type) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _is_record(line: bytes) -> bool:
    try:
        return isinstance(from_json(line), dict)
    except ValueError:
        return False


def _jsonl(records: Iterable[Mapping[str, object]]) -> str:
    return "".join(dump_json(record) + "\n" for record in records)


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return os.fspath(value) if isinstance(value, os.PathLike) else value
