"""JSON lists and JSON lines. Which of the two a text is follows from what it holds, not from the name of its file."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from mars_jax.data.files.row import MAX_TEXT_BYTES, Row, check_number, check_readable, numbered
from mars_jax.data.formats.keys import CONVERSATIONS
from mars_jax.errors import DataError
from mars_jax.runtime.text import json_type, short

Parsed = tuple[list[Row], list[str], list[str]]
"""Rows, faults and notes."""

# How files begin that are no texts.
_BINARY = {
    b"PAR1": "a parquet file. Name it .parquet",
    b"ARROW1": "an Arrow file. Name it .arrow",
    b"\xff\xff\xff\xff": "an Arrow stream. Name it .arrow",
    b"\x1f\x8b": "compressed by gzip. Unpack it",
    b"\x28\xb5\x2f\xfd": "compressed by zstd. Unpack it",
    b"\xfd7zXZ": "compressed by xz. Unpack it",
    b"BZh": "compressed by bzip2. Unpack it",
    b"PK\x03\x04": "a zip file (a spreadsheet, or an archive). Unpack it, or save it as CSV",
    b"\x80\x04": "a pickle, which is never opened. Save it as JSON",
    b"\xff\xfe": "UTF-16. Save it as UTF-8",
    b"\xfe\xff": "UTF-16. Save it as UTF-8",
}
_VISIBLE = re.compile(r"\S")
_WRAPPERS = ("data", "rows", "records", "samples", "examples", "items", "annotations", "train")


def read_text(path: Path) -> str:
    """The text of a file in UTF-8.

    Raises:
        DataError: it is no readable text, or too large.
    """
    facts = check_readable(path)
    if facts.st_size > MAX_TEXT_BYTES:
        raise DataError(
            f"{path}: has {facts.st_size:,} bytes, more than {MAX_TEXT_BYTES:,}. Save it as parquet, or split it."
        )
    try:
        content = path.read_bytes()
        kind = next((kind for start, kind in _BINARY.items() if content.startswith(start)), "")
        if kind:
            raise DataError(f"{path}: byte 0 is not UTF-8: the file is {kind}.")
        return content.decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}). Give a readable JSON or JSONL file.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not UTF-8. Save the file as UTF-8.") from error


def read_json(path: Path) -> object:
    """The JSON document of a file.

    Raises:
        DataError: it is none.
    """
    text = read_text(path)
    try:
        return _parsed(text)
    except (ValueError, RecursionError) as error:
        raise _not_json(path, error) from None


def read_samples(path: Path) -> Parsed:
    """The rows of a file with a JSON list, JSON lines, one record, or an object that holds a list.

    Raises:
        DataError: it holds something else.
    """
    text = read_text(path)
    start = _next(text, 0)
    if start == len(text):
        return [], [], []
    error: Exception | None = None
    try:
        document = _parsed(text)
    except (ValueError, RecursionError) as seen:
        error = seen
    if error is None:
        is_row = isinstance(document, dict) and not any(isinstance(document.get(key), list) for key in _WRAPPERS)
        is_line = path.suffix.lower() == ".jsonl" and _next(text, _line_end(text, start)) == len(text)
        return _lines(path, text) if is_row and is_line else _document(path, document)
    whole = text[start] == "[" and not _goes_on(error)
    first = text[start : _line_end(text, start)].strip()
    if whole or first == "{" or (path.suffix.lower() == ".json" and not (first.startswith("{") and _is_line(first))):
        raise _not_json(path, error)
    return _lines(path, text)


def read_lines(path: Path) -> Parsed:
    """The rows of a file of JSON lines, each of which may end in a comma.

    Raises:
        DataError: it is no readable text.
    """
    return _lines(path, read_text(path))


def _lines(path: Path, text: str) -> Parsed:
    rows, faults, commas = [], [], 0
    check_number(path, sum(1 for _ in _numbered_lines(text)))
    for row_number, (line_number, line) in enumerate(_numbered_lines(text)):
        source = f"{path.name}:{line_number}"
        bare = line.rstrip().removesuffix(",")
        commas += bare != line.rstrip()
        try:
            rows.append(Row(row_number, source, _parsed(bare)))
        except (ValueError, RecursionError) as error:
            faults.append(f"{source}: {_problem(error)}. Mend or remove the line.")
    return rows, faults, [f"{commas} lines end in a comma, which is not read"] if commas else []


def _numbered_lines(text: str) -> Iterator[tuple[int, str]]:
    """(number, line) of each line that is not blank, one at a time, since the text may be of gigabytes.

    Not by splitlines(): JSON strings may hold other Unicode line ends.
    """
    number = start = 0
    while start < len(text):
        end, number = _line_end(text, start), number + 1
        line = text[start:end]
        if line.strip():
            yield number, line
        start = end + 1


def _line_end(text: str, start: int) -> int:
    """Where the line ends that has this place."""
    end = text.find("\n", start)
    return len(text) if end < 0 else end


def _next(text: str, start: int) -> int:
    """Where the first character stands from a place on that is no white space; the length of the text if none does."""
    found = _VISIBLE.search(text, start)
    return found.start() if found else len(text)


def _document(path: Path, document: object) -> Parsed:
    if isinstance(document, list):
        return numbered(path, document), [], []
    if not isinstance(document, dict):
        raise DataError(f"{path}: the file holds a JSON {json_type(document)}; a list of records is expected.")
    if {*CONVERSATIONS, "question"} & document.keys() and not isinstance(document.get("question"), list):
        return numbered(path, [document]), [], []
    lists = [key for key, value in document.items() if isinstance(value, list)]
    if len(lists) == 1 and lists[0] in _WRAPPERS:
        others = [key for key in document if key not in lists]
        notes = [f"rows are those of {lists[0]!r}; not read: {short(others)}"] if others else []
        return numbered(path, document[lists[0]]), [], notes
    hint = ""
    if lists:
        hint = f" It has the lists {short(lists)}. Write the rows of one of them to a file of its own."
    elif document and all(isinstance(value, dict) for value in document.values()):
        hint = " It has an object for each key. Write a list of them, each with its key as 'id'."
    raise DataError(f"{path}: the file holds a JSON object; a list of records is expected.{hint}")


class _TwiceError(ValueError):
    """An object has a key twice; its argument is the key."""


def _parsed(text: str) -> object:
    """The value of a JSON text, no object of which has a key twice."""
    return _DECODER.decode(text)


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise _TwiceError(Counter(name for name, _ in pairs).most_common(1)[0][0])
    return made


_DECODER = json.JSONDecoder(object_pairs_hook=_once)


def _goes_on(error: Exception) -> bool:
    return isinstance(error, json.JSONDecodeError) and error.msg == "Extra data"


def _is_line(line: str) -> bool:
    try:
        _parsed(line.removesuffix(","))
    except (ValueError, RecursionError):
        return False
    return True


def _not_json(path: Path, error: Exception) -> DataError:
    line = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
    hint = ""
    if _goes_on(error):
        hint = " Write one object on each line (JSON lines), or a list of them."
    return DataError(f"{path}{line}: {_problem(error)}. Mend it{' there' * bool(line)}.{hint}")


def _problem(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON at column {error.colno} ({error.msg})"
    if isinstance(error, _TwiceError):
        return f"an object has the key {short(error.args[0])} twice"
    if isinstance(error, RecursionError):
        return "not readable JSON (lists or objects nested too deep)"
    return "not readable JSON (a number with thousands of digits)"
