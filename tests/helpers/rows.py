"""Files and tables of rows with pictures, and what reading them comes to."""

import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow
import pytest

from mars_jax.data.records import Record, load_records
from mars_jax.errors import DataError
from tests.helpers.tiny_data import save_picture


def read(
    folder: Path, rows: object, name: str = "data.json", **settings: object
) -> tuple[tuple[Record, ...], list[str]]:
    """The records and notes of a file: of rows, or of a content that is given as text or bytes."""
    for number, picture in enumerate(("a.png", "b.png")):
        if not (folder / picture).exists():
            save_picture(folder / picture, seed=number)
    content = rows if isinstance(rows, str | bytes) else json.dumps(rows)
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    notes: list[str] = []
    return load_records(folder / name, note=notes.append, **settings), notes


def fault(folder: Path, rows: object, name: str = "data.json") -> str:
    """The message that refuses a file."""
    with pytest.raises(DataError) as caught:
        read(folder, rows, name)
    return str(caught.value)


def table(picture: bytes, numbers: Sequence[int] = (0, 1)) -> pyarrow.Table:
    """A table of open questions on one picture, with these ids."""
    rows = [
        {"id": str(n), "image": {"bytes": picture, "path": None}, "question": f"{n}?", "answer": "x"} for n in numbers
    ]
    return pyarrow.Table.from_pylist(rows)


def arrow(path: Path, content: pyarrow.Table, stream: bool = True) -> Path:
    """An Arrow file, written as a stream or as a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = pyarrow.ipc.new_stream if stream else pyarrow.ipc.new_file
    with new(str(path), content.schema) as writer:
        writer.write_table(content)
    return path
