"""LLaVA JSON and JSONL files to checked records. Every fault of a file is found before the first training step.

Reads text and opens pictures to check them; tokens and tiles are made elsewhere, from the records.
"""

import hashlib
import json
import reprlib
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Literal

from PIL import Image

from mars_jax.data.images import load_rgb
from mars_jax.errors import DataError

IMAGE_PLACEHOLDER = "<image>"

Role = Literal["user", "assistant", "system"]
_ROLES: Mapping[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
_MAX_FAULTS_SHOWN = 10


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation; user text holds `<image>` where the picture goes."""

    role: Role
    text: str


@dataclass(frozen=True, slots=True)
class Record:
    """One checked conversation.

    Attributes:
        id: unique in its file.
        images: paths of its pictures, in the order of their placeholders.
        turns: an optional system turn, then user and assistant in turn, ending with the assistant.
        source: "file:line" or "file item N", for messages.
        group: what must not cross splits: "image:SHA256 of the picture's bytes", or "text:ID" without a picture.
            Records that share pictures, also through others, have the smallest of all their hashes in common.
        digests: SHA256 of the bytes of each picture.
    """

    id: str
    images: tuple[Path, ...]
    turns: tuple[Turn, ...]
    source: str
    group: str
    digests: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.source} (id {self.id!r})"


@dataclass(frozen=True, slots=True)
class _Item:
    """A parsed but unchecked entry of the file."""

    number: int
    source: str
    value: Any

    @property
    def id(self) -> str:
        given = self.value.get("id") if isinstance(self.value, dict) else None
        return f"item-{self.number}" if given is None else str(given)

    def fault(self, what: str) -> str:
        return f"{self.source} (id {self.id!r}): {what}"


def load_records(path: Path, image_root: Path) -> tuple[Record, ...]:
    """Reads and checks a whole LLaVA file: a JSON list, or JSON lines if the name ends in `.jsonl`.

    An entry is `{"id", "image", "conversations": [{"from": "human"|"gpt"|..., "value": text}, ...]}`. Without "image"
    it is text only; without "id" it is called "item-N".

    Args:
        path: the file.
        image_root: folder that the entries' image paths are relative to.

    Raises:
        DataError: lists up to ten faults, each with item (and line), id, the value seen and what to do.
    """
    items, faults = _read_items(path)
    pictures = _check_pictures(items, image_root)
    uses = Counter(item.id for item in items)
    for item in items:
        faults.extend(item.fault(what) for what in _faults(item.value, pictures))
        if uses[item.id] > 1:
            faults.append(item.fault(f"the id is used {uses[item.id]} times. Make ids unique."))
    if faults:
        raise DataError(_summary(path, faults))
    if not items:
        raise DataError(f"{path}: no records in the file. Give it at least one conversation.")
    groups = _groups([[pictures[name].sha256 for name in _image_names(item.value)] for item in items])
    return tuple(_record(item, image_root, pictures, groups) for item in items)


def _summary(path: Path, faults: list[str]) -> str:
    shown = faults[:_MAX_FAULTS_SHOWN]
    count = f"{len(faults)} fault{'s' if len(faults) > 1 else ''}"
    if len(faults) > len(shown):
        count += f", the first {len(shown)} shown"
    return f"{path}: {count}. Nothing was trained; mend the file and run again.\n  " + "\n  ".join(shown)


def _read_items(path: Path) -> tuple[list[_Item], list[str]]:
    """The entries that parse, and a fault for each line that does not."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file. Check the path in the configuration.") from None
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}). Give a readable LLaVA JSON or JSONL file."
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not UTF-8. Save the file as UTF-8.") from error
    if path.suffix == ".jsonl":
        return _read_lines(path, text)
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        hint = " For one object on each line, name the file .jsonl." if error.msg == "Extra data" else ""
        raise DataError(
            f"{path}:{error.lineno}: not valid JSON at column {error.colno} ({error.msg}). Mend it there.{hint}"
        ) from error
    if not isinstance(values, list):
        raise DataError(f"{path}: the file holds a JSON {type(values).__name__}; a list of records is expected.")
    return [_Item(number, f"{path.name} item {number}", value) for number, value in enumerate(values)], []


def _read_lines(path: Path, text: str) -> tuple[list[_Item], list[str]]:
    items, faults = [], []
    # Not splitlines(): JSON strings may hold other Unicode line ends.
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    for item_number, (line_number, line) in enumerate(lines):
        source = f"{path.name}:{line_number}"
        try:
            items.append(_Item(item_number, source, json.loads(line)))
        except json.JSONDecodeError as error:
            faults.append(f"{source}: not valid JSON at column {error.colno} ({error.msg}). Mend or remove the line.")
    return items, faults


def _image_names(value: Any) -> list[Any]:
    names = value.get("image") if isinstance(value, dict) else None
    if names is None:
        return []
    return names if isinstance(names, list) else [names]


def _path_fault(name: Any) -> str | None:
    if not isinstance(name, str) or not name:
        return f"image is {name!r}; a path relative to the image folder is expected."
    windows = PureWindowsPath(name)
    if PurePosixPath(name).is_absolute() or windows.is_absolute() or ".." in windows.parts:
        return f"image {name!r} points outside the image folder. Use a path below it, without '..'."
    return None


@dataclass(frozen=True, slots=True)
class _Picture:
    sha256: str
    fault: str | None


def _check_pictures(items: list[_Item], image_root: Path) -> dict[str, _Picture]:
    """Decodes every picture once, however many records share it."""
    names = {name for item in items for name in _image_names(item.value) if _path_fault(name) is None}
    with ThreadPoolExecutor() as pool:
        return dict(zip(names, pool.map(lambda name: _check_picture(name, image_root), names), strict=True))


def _check_picture(name: str, image_root: Path) -> _Picture:
    path = image_root / name
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        with Image.open(path) as image:
            image.verify()
        load_rgb(path)
    except FileNotFoundError:
        return _Picture("", f"image {name!r} does not exist in {image_root}. Add the file or mend the path.")
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        return _Picture("", f"image {name!r} is over the safety limit ({error}). Scale the picture down.")
    except DataError as error:
        return _Picture("", f"image {name!r}: {error}")
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and others.
        return _Picture("", f"image {name!r} cannot be decoded ({error}). Replace the file.")
    return _Picture(digest, None)


def _faults(value: Any, pictures: Mapping[str, _Picture]) -> Iterator[str]:
    if not isinstance(value, dict):
        yield f"the record is a JSON {type(value).__name__}; an object with 'conversations' is expected."
        return
    names = _image_names(value)
    for name in names:
        fault = _path_fault(name) or pictures[name].fault
        if fault:
            yield fault
    turns = value.get("conversations")
    if not isinstance(turns, list) or not turns:
        yield f"'conversations' is {reprlib.repr(turns)}; a list of {{'from', 'value'}} turns is expected."
        return
    malformed = [
        f"turn {number} is {reprlib.repr(turn)}; an object with the strings 'from' and 'value' is expected."
        for number, turn in enumerate(turns)
        if not (isinstance(turn, dict) and isinstance(turn.get("from"), str) and isinstance(turn.get("value"), str))
    ] or [
        f"turn {number} is from {turn['from']!r}; allowed: {', '.join(_ROLES)}."
        for number, turn in enumerate(turns)
        if turn["from"] not in _ROLES
    ]
    if malformed:
        yield from malformed
        return
    yield from _conversation_faults(_turns(turns), len(names))


def _conversation_faults(turns: tuple[Turn, ...], num_images: int) -> Iterator[str]:
    roles = [turn.role for turn in turns]
    spoken = roles[1:] if roles[0] == "system" else roles
    expected = [("user", "assistant")[number % 2] for number in range(len(spoken))]
    if "assistant" not in roles:
        yield "no assistant turn, so nothing to learn. Add the answer."
    elif spoken[0] != "user":
        yield f"the conversation starts with {spoken[0]!r}; after an optional system turn the user must start."
    elif spoken != expected:
        yield f"the speakers are {', '.join(roles)}; user and assistant must alternate."
    elif spoken[-1] != "assistant":
        yield "the last user turn has no answer. Add it, or remove the turn."
    for number, turn in enumerate(turns):
        if turn.role == "assistant" and not turn.text.strip():
            yield f"turn {number}: the answer is empty. Write it, or remove the record."
        if turn.role != "user" and IMAGE_PLACEHOLDER in turn.text:
            yield f"turn {number}: {IMAGE_PLACEHOLDER} in a turn of the {turn.role}; only user turns may hold it."
    placeholders = sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in turns if turn.role == "user")
    if placeholders != num_images:
        yield (
            f"{placeholders} {IMAGE_PLACEHOLDER} in the user turns but {num_images} images. Write {IMAGE_PLACEHOLDER} "
            "once for each image."
        )


def _turns(turns: list[dict[str, str]]) -> tuple[Turn, ...]:
    return tuple(Turn(_ROLES[turn["from"]], turn["value"]) for turn in turns)


def _groups(sets: list[list[str]]) -> dict[str, str]:
    """Digest -> the smallest digest among all that are connected with it, two being so where a record has both."""
    parent = {digest: digest for digests in sets for digest in digests}

    def root(digest: str) -> str:
        while parent[digest] != digest:
            parent[digest] = digest = parent[parent[digest]]
        return digest

    for first, *others in filter(None, sets):
        for other in others:
            smaller, larger = sorted((root(first), root(other)))
            parent[larger] = smaller
    return {digest: root(digest) for digest in parent}


def _record(item: _Item, image_root: Path, pictures: Mapping[str, _Picture], groups: Mapping[str, str]) -> Record:
    names = _image_names(item.value)
    digests = tuple(pictures[name].sha256 for name in names)
    return Record(
        id=item.id,
        images=tuple(image_root / name for name in names),
        turns=_turns(item.value["conversations"]),
        source=item.source,
        group=f"image:{groups[digests[0]]}" if digests else f"text:{item.id}",
        digests=digests,
    )
