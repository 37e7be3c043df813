"""Reads files of samples into checked records, so that all faults of a file are reported before training starts.

`rows` reads the files, `formats` the rows, and `conversations` checks the turns. This module opens the pictures and
names the records; tokens and tiles are computed from the records later.
"""

import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from PIL import Image

from mars_jax.data.conversations import conversation_faults, finished, has_boxes, only_last, oversize
from mars_jax.data.files.row import MAX_ID, Row
from mars_jax.data.formats.base import Draft, FaultError, Turn
from mars_jax.data.formats.registry import draft
from mars_jax.data.images import MAX_PIXELS, Picture, PictureBytes, PictureError, load_rgb, open_picture
from mars_jax.data.notes import Notes
from mars_jax.data.rows import read_rows
from mars_jax.errors import DataError
from mars_jax.runtime.text import short

MAX_PICTURES = 1_000
"""Pictures of one row."""

MAX_ROW_PIXELS = 4 * MAX_PIXELS
"""Pixels of all pictures of one row."""

_LOGGER = logging.getLogger(__name__)
_MAX_FAULTS_SHOWN = 10
_MAX_THREADS = 8

Learn = Literal["all", "last"]
"""Which answers of a conversation are trained on, of those that its row does not exclude."""


@dataclass(frozen=True, slots=True)
class Record:
    """One checked conversation.

    Attributes:
        id: identifier, unique in its file.
        images: pictures in the order of their placeholders: paths, or bytes embedded in the file.
        turns: an optional system turn, then user and assistant alternating, ending with an answer that is trained on.
        source: "file:line" or "file item N", for messages.
        group: records of one group go to the same split. "image:SHA256 of the picture's bytes", or "text:ID" without a
            picture; records connected by shared pictures have the smallest of their hashes.
        digests: SHA256 of the bytes of each picture.
        format: name of its data format, one of `formats.registry.FORMATS`.
        options: allowed texts of the last answer; empty for an open question.
        tags: (name, value) of each category of question that it belongs to.
    """

    id: str
    images: tuple[Picture, ...]
    turns: tuple[Turn, ...]
    source: str
    group: str
    digests: tuple[str, ...]
    format: str = "llava"
    options: tuple[str, ...] = ()
    tags: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        return f"{self.source} (id {self.id!r})"


def load_records(
    path: Path,
    image_root: Path | None = None,
    *,
    learn: Learn = "all",
    note: Callable[[str], None] = _LOGGER.warning,
) -> tuple[Record, ...]:
    """Reads and checks a whole file or folder.

    A record whose row has no id gets the id "item-N"; the second one with an id "x" gets the id "x#2".

    Args:
        path: a file, `folder` or `folder#split` that `rows` can read, with rows in any of the data formats.
        image_root: folder that paths of pictures are relative to. Default: the folder of the file, or the picture
            folder of a data set with a known layout.
        learn: which answers are trained on.
        note: called with each note: what was not read, put right or may surprise, with its number of rows.

    Returns:
        A record for each row, in the order of the file.

    Raises:
        DataError: lists up to ten faults, each with item (and line), id, the value seen and what to do.
    """
    read = read_rows(path)
    faults, notes = list(read.faults), Notes(others=list(read.notes))
    drafts: list[tuple[Row, Draft]] = []
    for row in read.rows:
        try:
            made = draft(row.value)
        except FaultError as error:
            faults.extend(row.fault(what) for what in error.args)
            continue
        problems = [*_bound_faults(made), *_id_faults(row), *_encoding_faults(row.id, made)]
        faults.extend(row.fault(what) for what in problems)
        if not problems:
            drafts.append((row, made))
    checked = _check_pictures([made for _, made in drafts], image_root or read.root)
    for row, made in drafts:
        pictures = [checked[image] for image in made.images]
        faults.extend(row.fault(picture.fault) for picture in pictures if picture.fault)
        faults.extend(row.fault(what) for what in conversation_faults(made.turns, len(pictures)))
        pixels = sum(picture.pixels for picture in pictures)
        if pixels > MAX_ROW_PIXELS:
            faults.append(
                row.fault(f"its pictures have {pixels:,} pixels, more than {MAX_ROW_PIXELS:,}. Scale them down.")
            )
    if faults:
        raise DataError(_summary(path, faults))
    if not read.rows:
        raise DataError(f"{path}: no records in the file. Give it at least one conversation.")
    groups = _groups([[checked[image].sha256 for image in made.images] for _, made in drafts])
    ids = _unique_ids([row for row, _ in drafts], notes)
    records = [
        _record(row, unique, made, checked, groups, learn, notes)
        for (row, made), unique in zip(drafts, ids, strict=True)
    ]
    for text in notes.texts():
        note(f"{path.name}: {text}")
    return tuple(records)


def _summary(path: Path, faults: list[str]) -> str:
    listed = faults[:_MAX_FAULTS_SHOWN]
    count = f"{len(faults)} fault{'s' if len(faults) > 1 else ''}"
    if len(faults) > len(listed):
        count += f", the first {len(listed)} shown"
    return f"{path}: {count}. Nothing was trained; mend the file and run again.\n  " + "\n  ".join(listed)


def _bound_faults(made: Draft) -> Iterator[str]:
    fault = oversize(made.turns)
    if fault:
        yield fault
    if len(made.images) > MAX_PICTURES:
        yield f"{len(made.images):,} pictures, more than {MAX_PICTURES:,}. Split the record."


def _encoding_faults(row_id: str, made: Draft) -> Iterator[str]:
    """Faults of texts with half a surrogate pair, which no tokenizer takes."""
    texts = [("id", row_id), *((f"tag {name!r}", value) for name, value in made.tags)]
    texts += [(f"turn {number}", turn.text) for number, turn in enumerate(made.turns)]
    texts += [("image", image) for image in made.images if isinstance(image, str)]
    for where, text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            yield (
                f"{where}: character {error.start} is {text[error.start]!r}, half of a surrogate pair: the text was "
                "cut within a character. Write the whole character, or take the half out."
            )


# Ids.


def _id_faults(row: Row) -> Iterator[str]:
    if not row.has_valid_id:
        yield f"the id is no text or number of at most {MAX_ID} characters. Write another."


def _unique_ids(rows: Sequence[Row], notes: Notes) -> list[str]:
    """The id of each row, with #2, #3, ... where an earlier row has it."""
    taken, uses, ids = {row.id for row in rows}, dict.fromkeys((row.id for row in rows), 0), []
    for row in rows:
        if row.has_empty_id:
            notes.change("no_id", row.id)
        unique = row.id
        uses[row.id] += 1
        if uses[row.id] > 1:
            while unique in taken:
                unique = f"{row.id}#{uses[row.id]}"
                uses[row.id] += unique in taken
            taken.add(unique)
            notes.change("repeated_id", short(row.id))
        ids.append(unique)
    return ids


# Pictures.


@dataclass(frozen=True, slots=True)
class _Checked:
    picture: Picture
    sha256: str = ""
    pixels: int = 0
    fault: str | None = None


def _check_pictures(drafts: Sequence[Draft], image_root: Path) -> dict[str | bytes, _Checked]:
    """Decodes every picture once, however many records share it."""
    images = {image for made in drafts for image in made.images}
    with ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1)) as pool:
        return dict(zip(images, pool.map(lambda image: _check_picture(image, image_root), images), strict=True))


def _check_picture(image: str | bytes, image_root: Path) -> _Checked:
    name = "in the file" if isinstance(image, bytes) else short(image)
    picture: Picture = PictureBytes(image) if isinstance(image, bytes) else image_root / image

    def faulty(what: str) -> _Checked:
        return _Checked(picture, fault=f"image {name} {what[:500]}")

    try:
        picture = PictureBytes(image) if isinstance(image, bytes) else _located(image, image_root)
        with open_picture(picture) as opened:
            opened.verify()
        pixels = load_rgb(picture)
        return _Checked(picture, _digest(picture), pixels.width * pixels.height)
    except FileNotFoundError:
        return faulty(f"does not exist in {image_root}. Add the file or mend the path.")
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        return faulty(f"is over the safety limit ({error}). Scale the picture down.")
    except PictureError as error:
        return faulty(error.problem)
    except FaultError as error:
        return faulty(str(error))
    except OSError as error:
        what = f"cannot be read ({error.strerror})" if error.strerror else f"cannot be decoded ({error})"
        return faulty(f"{what}. Replace the file.")
    except Exception as error:  # Pillow's decoders raise SyntaxError, ValueError, struct.error and others.
        return faulty(f"cannot be decoded ({error}). Replace the file.")


def _located(image: str, image_root: Path) -> Path:
    """The file of a path in a row: below the image folder. Links within the folder are followed wherever they lead.

    Raises:
        FaultError: it is outside.
    """
    path = PurePosixPath(image)
    if not (path.is_absolute() or ".." in path.parts):
        return image_root / image
    root, target = os.path.abspath(image_root), os.path.normpath(os.path.join(os.path.abspath(image_root), image))
    for above, below in ((root, target), (os.path.realpath(root), os.path.realpath(target))):
        if Path(below).is_relative_to(above):
            return Path(target)
        if not path.is_absolute():
            break
    raise FaultError(
        f"points outside the image folder {image_root}. Use a path below it, or set data.image_root to a folder above."
    )


def _digest(picture: Picture) -> str:
    if isinstance(picture, PictureBytes):
        return hashlib.sha256(picture.data).hexdigest()
    with picture.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _groups(sets: list[list[str]]) -> dict[str, str]:
    """Maps each digest to the smallest of its connected component; digests of one record are connected."""
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


# Records.


def _record(
    row: Row,
    unique_id: str,
    made: Draft,
    checked: Mapping[str | bytes, _Checked],
    groups: Mapping[str, str],
    learn: Learn,
    notes: Notes,
) -> Record:
    ready = finished(made)
    turns = only_last(ready.turns) if learn == "last" else ready.turns
    images = made.images[: ready.num_pictures]
    digests = tuple(checked[image].sha256 for image in images)
    notes.unread.update(dict.fromkeys(made.unread, 1))  # in the order of the row
    notes.formats[made.format] += 1
    for change in ready.changes:
        notes.change(change, short(unique_id))
    boxes = has_boxes(turns) if images else ""
    if boxes:
        notes.change("boxes", f"{short(unique_id)} has {short(boxes)}")
    return Record(
        id=unique_id,
        images=tuple(checked[image].picture for image in images),
        turns=turns,
        source=row.source,
        group=f"image:{groups[digests[0]]}" if digests else f"text:{unique_id}",
        digests=digests,
        format=made.format,
        options=made.options,
        tags=made.tags,
    )
