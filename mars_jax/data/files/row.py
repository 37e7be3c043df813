"""A row of a file of samples, and what reading files shares: their size, their kind and their number of rows."""

import math
import os
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from mars_jax.data.images import kind_of_file
from mars_jax.data.values import is_absent
from mars_jax.errors import DataError
from mars_jax.runtime.text import short

MAX_ROWS = 2_000_000
"""Rows of one file."""

MAX_TEXT_BYTES = 2**32
"""Bytes of one JSON, JSON lines, CSV or TSV file."""

MAX_ID = 500
"""Characters of an id."""

_ID_KEYS = ("id", "question_id", "index")


@dataclass(frozen=True, slots=True)
class Row:
    """A parsed but unchecked entry.

    Attributes:
        number: index among the rows of its file, from 0.
        source: "file:line" or "file item N", for messages.
        value: the parsed value; only a JSON object can become a record.
    """

    number: int
    source: str
    value: object

    @property
    def id(self) -> str:
        """Its `id`, `question_id` or `index`, if one of them can name it, else "item-N"."""
        value = self._id
        return str(value) if value is not None and _is_name(value) else f"item-{self.number}"

    @property
    def has_valid_id(self) -> bool:
        """Whether its id, if any, is a text or a number, and no longer than `MAX_ID`."""
        value = self._id
        return value is None or _is_name(value)

    @property
    def has_empty_id(self) -> bool:
        """Whether it has a key of an id without a value: null, NaN or an empty text."""
        return self._id is None and isinstance(self.value, dict) and any(key in self.value for key in _ID_KEYS)

    def fault(self, what: str) -> str:
        """A message that names the row and its fault."""
        value = self._id
        written = self.id if value is None or _is_name(value) else value
        return f"{self.source} (id {short(written)}): {what}"

    @property
    def _id(self) -> object:
        row = self.value if isinstance(self.value, dict) else {}
        return next((row[key] for key in _ID_KEYS if not is_absent(row.get(key))), None)


def _is_name(value: object) -> bool:
    """Whether an id is a text or a number, and no longer than `MAX_ID`."""
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, str | int) and not isinstance(value, bool) and len(str(value)) <= MAX_ID


@dataclass(frozen=True, slots=True)
class Rows:
    """What is in a file or folder.

    Attributes:
        rows: the rows that parse.
        root: folder that picture paths are relative to.
        faults: a fault for each row that does not parse.
        notes: what was not read.
    """

    rows: Sequence[Row]
    root: Path
    faults: Sequence[str] = ()
    notes: Sequence[str] = ()


def numbered(path: Path, values: Iterable[object]) -> list[Row]:
    """The rows of the entries of a file, which are called "file item N".

    Raises:
        DataError: there are more than `MAX_ROWS`.
    """
    rows = [Row(n, f"{path.name} item {n}", value) for n, value in enumerate(islice(values, MAX_ROWS + 1))]
    check_number(path, len(rows))
    return rows


def check_number(path: Path, number: int) -> None:
    """Refuses more than `MAX_ROWS` rows.

    Raises:
        DataError: there are more.
    """
    if number > MAX_ROWS:
        raise DataError(f"{path}: more than {MAX_ROWS:,} rows. Give fewer: take a sample of them.")


def facts_of(path: Path) -> os.stat_result | None:
    """The facts of a file or folder; None if there is none of this name.

    Raises:
        DataError: no file can have such a name, or it cannot be reached.
    """
    try:
        return path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(
            f"{short(str(path))}: cannot be read ({reason}). Check the path in the configuration."
        ) from None


def is_folder(path: Path) -> bool:
    """Whether there is a folder of this name."""
    facts = facts_of(path)
    return facts is not None and stat.S_ISDIR(facts.st_mode)


def check_readable(path: Path) -> os.stat_result:
    """The facts of a regular file that can be read; it is not opened.

    Raises:
        DataError: it is absent, another kind of file, or not to be read.
    """
    facts = facts_of(path)
    if facts is None:
        hint = "" if path.suffix else " A data set on the hub is written hf://datasets/OWNER/NAME."
        raise DataError(f"{path}: no such file. Check the path in the configuration.{hint}")
    if not stat.S_ISREG(facts.st_mode):
        raise DataError(f"{path}: is {kind_of_file(facts.st_mode)}, not a file. Give the file with the samples.")
    if not os.access(path, os.R_OK):
        raise DataError(f"{path}: cannot be read (Permission denied). Give a readable file.")
    return facts
