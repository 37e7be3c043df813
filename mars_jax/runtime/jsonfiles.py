"""JSON files: documents written atomically, and JSON Lines files that survive a killed writer.

Floats keep all their digits; NaN and infinities, which JSON lacks, become null.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mars_jax.errors import DataError

Document = dict[str, Any]
"""A JSON object."""


def number_or_nan(value: float | None) -> float:
    """A number as `dump_json` wrote it: null stands for NaN and infinities."""
    return math.nan if value is None else value


def dump_json(value: object, indent: int | None = None, ascii: bool = False) -> str:
    """JSON text of a value, keys in their own order; paths become text, arrays lists, their scalars numbers.

    Args:
        value: what is written.
        indent: spaces of a level; None: all on one line.
        ascii: write other characters as escapes, for streams of any encoding and terminals.
    """
    return json.dumps(_plain(value), indent=indent, ensure_ascii=ascii, allow_nan=False)


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically: a reader, or a run after a crash, sees the old text or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with naming(path), temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: object) -> None:
    """Writes one JSON document atomically."""
    write_text(path, dump_json(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Reads a JSON document.

    Raises:
        DataError: the file is absent or isn't JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"can't read {path}: {error.strerror}") from None
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}. Delete it, and run the command that writes it again.") from None


def append_jsonl(path: Path, record: Mapping[str, object]) -> None:
    """Appends one record as a line, after cutting off an incomplete last line of a killed writer."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = dump_json(record).encode() + b"\n"
    with naming(path), path.open("a+b") as file:
        end = file.tell()
        if end:
            file.seek(end - 1)
            if file.read(1) != b"\n":
                file.seek(0)
                content = file.read()
                start = content.rfind(b"\n") + 1
                if _record(content[start:]) is None:
                    file.truncate(start)
                else:
                    line = b"\n" + line
        file.write(line)


def read_jsonl(path: Path, warn: Callable[[str], None]) -> list[Document]:
    """Reads the records of a JSON Lines file; none if the file is absent.

    Args:
        path: the file.
        warn: called with a message where the last line is incomplete, as after a kill, and is left out.

    Raises:
        DataError: another line isn't a JSON object.
    """
    if not path.exists():
        return []
    content = path.read_bytes()
    lines = content.split(b"\n")
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        record = _record(line)
        if record is not None:
            records.append(record)
        elif number == len(lines):
            warn(f"{path}, line {number}: incomplete, as after a kill, and left out")
        else:
            raise DataError(
                f"{path}, line {number}: not a JSON object: {line[:80].decode(errors='replace')!r}. Delete the line."
            )
    return records


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Adds the path to an `OSError` without one: errors of `write`, unlike those of `open`, name no file."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def _record(line: bytes) -> Document | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


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
