"""Tables: parquet and Arrow files, CSV and TSV. Those of Arrow are read in small batches, under a limit of bytes."""

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mars_jax.data.files.json_text import Parsed, read_text
from mars_jax.data.files.row import Row, check_number, check_readable
from mars_jax.errors import DataError
from mars_jax.runtime.text import short

if TYPE_CHECKING:
    import pyarrow

MOST_GROWTH = 100
"""A table may be this many times as large in memory as its file, or `FREE_BYTES`; more is taken for a bomb."""

FREE_BYTES = 2**30
"""Bytes in memory that any table may have."""

_BATCH_BYTES = 2**28
_BATCH_ROWS = 256
_MAX_CELL = 2**28
_SEPARATORS = {";": "';'", "\t": "tabs", ",": "','", "|": "'|'"}


def read_parquet(paths: Sequence[Path]) -> list[Row]:
    """The rows of parquet files, one after the other.

    Raises:
        DataError: a file cannot be read, or is far larger in memory than on disk.
    """
    return _rows(paths, _parquet_batches, "parquet")


def read_arrow(paths: Sequence[Path]) -> list[Row]:
    """The rows of Arrow files, as `datasets` saves them, one after the other.

    Raises:
        DataError: a file cannot be read, or is far larger in memory than on disk.
    """
    return _rows(paths, _arrow_batches, "an Arrow stream")


def read_csv(path: Path) -> Parsed:
    """Rows, faults and notes of a CSV or TSV file with a line of names. Empty cells are null.

    A picture that is the number of another row is that row's, as in VLMEvalKit's tables.
    """
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    rows: list[Row] = []
    faults: list[str] = []
    limit = csv.field_size_limit(_MAX_CELL)
    try:
        lines = csv.reader(io.StringIO(read_text(path), newline=""), delimiter=delimiter)
        names = next(lines, [])
        other = next((char for char in _SEPARATORS if len(names) == 1 and char in names[0]), "")
        if other == delimiter:
            raise DataError(
                f"{path}: the first line is {short(names[0])}, a single name: its quotes stand around the whole line. "
                "Write them around single cells, or leave them out."
            )
        if other:
            raise DataError(
                f"{path}: the first line is {short(names[0])}, a single name: it has {_SEPARATORS[other]} and no "
                f"{_SEPARATORS[delimiter]}. A .csv file is read with commas, a .tsv file with tabs. Save it so."
            )
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise DataError(f"{path}: the first line has {twice[0]!r} twice. Give every column a name of its own.")
        for cells in lines:
            if not cells:
                continue
            source = f"{path.name}:{lines.line_num}"
            if len(cells) != len(names):
                faults.append(f"{source}: {len(cells)} cells, but the first line names {len(names)}. Mend the line.")
                continue
            check_number(path, len(rows) + 1)
            values = {name: cell or None for name, cell in zip(names, cells, strict=True)}
            rows.append(Row(len(rows), source, values))
    except csv.Error as error:
        raise DataError(f"{path}:{lines.line_num}: cannot be read as a table ({error}). Mend it there.") from None
    finally:
        csv.field_size_limit(limit)
    pictures = {row.id: row.value.get("image") for row in rows if isinstance(row.value, dict)}
    for row in rows:
        if isinstance(row.value, dict) and str(row.value.get("image") or "").isdecimal():
            row.value["image"] = pictures.get(row.value["image"]) or row.value["image"]
    return rows, faults, []


def _rows(
    paths: Sequence[Path], batches: Callable[[Path, int], Iterator["pyarrow.RecordBatch"]], kind: str
) -> list[Row]:
    import pyarrow

    rows: list[Row] = []
    for path in paths:
        size = check_readable(path).st_size
        most, taken, first = max(FREE_BYTES, MOST_GROWTH * size), 0, len(rows)
        try:
            for batch in batches(path, most):
                check_number(path, len(rows) + batch.num_rows)
                for value in batch.to_pylist():
                    # Not the table's own count: a column may be a dictionary, whose values it counts once.
                    taken += _bytes(value)
                    if taken > most:
                        raise _too_large(path, size, most)
                    rows.append(Row(len(rows), f"{path.name} item {len(rows) - first}", value))
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            reason = str(error).partition("\n")[0][:300]
            raise DataError(f"{path}: cannot be read as {kind} ({reason}). Fetch the file again.") from error
    return rows


def _too_large(path: Path, size: int, most: int) -> DataError:
    return DataError(
        f"{path}: its {size:,} bytes hold more than {most:,} in memory. Give the pictures as files, or take a sample."
    )


def _parquet_batches(path: Path, most: int) -> Iterator["pyarrow.RecordBatch"]:
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        facts = file.metadata
        check_number(path, facts.num_rows)
        sizes = [facts.row_group(number).total_byte_size for number in range(facts.num_row_groups)]
        if sum(sizes) > most:
            raise _too_large(path, check_readable(path).st_size, most)
        # No value is larger than its row group. (Facts of single columns end the process where they are broken.)
        yield from file.iter_batches(_batch_rows(max(sizes, default=0)))


def _arrow_batches(path: Path, most: int) -> Iterator["pyarrow.RecordBatch"]:
    import pyarrow

    with pyarrow.memory_map(str(path)) as file:
        if file.read(6) == b"ARROW1":
            opened = pyarrow.ipc.open_file(file)
            stored = (opened.get_batch(number) for number in range(opened.num_record_batches))
        else:
            file.seek(0)
            stored = iter(pyarrow.ipc.open_stream(file))
        for batch in stored:
            step = _batch_rows(batch.get_total_buffer_size())
            for start in range(0, batch.num_rows, step):
                yield batch.slice(start, step)


def _bytes(value: object) -> int:
    """The bytes of the texts and pictures in a value."""
    if isinstance(value, dict):
        return sum(map(_bytes, value.values()))
    if isinstance(value, list):
        return sum(map(_bytes, value))
    return len(value) if isinstance(value, str | bytes) else 8


def _batch_rows(largest: int) -> int:
    """Rows of a batch, so that it fits in memory where every row had a value of this size."""
    return max(1, min(_BATCH_ROWS, _BATCH_BYTES // max(largest, 1)))
