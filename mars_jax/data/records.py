"""Reads files of samples into checked records, so that all faults of a file are reported before training starts.

`rows` reads the files and `formats` the rows. This module opens the pictures and checks the conversations; tokens and
tiles are computed from the records later.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from mars_jax.data.formats.base import IMAGE_PLACEHOLDER, Draft, FaultError, Turn
from mars_jax.data.formats.registry import draft
from mars_jax.data.images import Picture, PictureBytes, load_rgb, open_picture
from mars_jax.data.rows import Row, read_rows
from mars_jax.errors import DataError

_MAX_FAULTS_SHOWN = 10


@dataclass(frozen=True, slots=True)
class Record:
    """One checked conversation.

    Attributes:
        id: identifier, unique in its file.
        images: pictures in the order of their placeholders: paths, or bytes embedded in the file.
        turns: an optional system turn, then user and assistant alternating, ending with the assistant.
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


def load_records(path: Path, image_root: Path | None = None) -> tuple[Record, ...]:
    """Reads and checks a whole file or folder.

    A record whose row has no id gets the id "item-N".

    Args:
        path: a file, `folder` or `folder#split` that `rows` can read, with rows in any of the data formats.
        image_root: folder that paths of pictures are relative to. Default: the folder of the file, or the picture
            folder of a data set with a known layout.

    Returns:
        A record for each row, in the order of the file.

    Raises:
        DataError: lists up to ten faults, each with item (and line), id, the value seen and what to do.
    """
    rows, faults, default_root = read_rows(path)
    drafts: list[tuple[Row, Draft]] = []
    for row in rows:
        try:
            drafts.append((row, draft(row.value)))
        except FaultError as error:
            faults.extend(row.fault(what) for what in error.args)
    checked = _check_pictures([made for _, made in drafts], image_root or default_root)
    for row, made in drafts:
        pictures = [checked[image] for image in made.images]
        faults.extend(row.fault(picture.fault) for picture in pictures if picture.fault)
        faults.extend(row.fault(what) for what in _conversation_faults(made.turns, len(pictures)))
    uses = Counter(row.id for row in rows)
    faults.extend(
        row.fault(f"the id is used {uses[row.id]} times. Make ids unique.") for row in rows if uses[row.id] > 1
    )
    if faults:
        raise DataError(_summary(path, faults))
    if not rows:
        raise DataError(f"{path}: no records in the file. Give it at least one conversation.")
    groups = _groups([[checked[image].sha256 for image in made.images] for _, made in drafts])
    return tuple(_record(row, made, checked, groups) for row, made in drafts)


def _summary(path: Path, faults: list[str]) -> str:
    listed = faults[:_MAX_FAULTS_SHOWN]
    count = f"{len(faults)} fault{'s' if len(faults) > 1 else ''}"
    if len(faults) > len(listed):
        count += f", the first {len(listed)} shown"
    return f"{path}: {count}. Nothing was trained; mend the file and run again.\n  " + "\n  ".join(listed)


@dataclass(frozen=True, slots=True)
class _Checked:
    picture: Picture
    sha256: str
    fault: str | None


def _check_pictures(drafts: Sequence[Draft], image_root: Path) -> dict[str | bytes, _Checked]:
    """Decodes every picture once, however many records share it."""
    images = {image for made in drafts for image in made.images}
    with ThreadPoolExecutor() as pool:
        return dict(zip(images, pool.map(lambda image: _check_picture(image, image_root), images), strict=True))


def _check_picture(image: str | bytes, image_root: Path) -> _Checked:
    picture: Picture = PictureBytes(image) if isinstance(image, bytes) else image_root / image
    name = "in the file" if isinstance(image, bytes) else repr(image)
    try:
        digest = hashlib.sha256(image if isinstance(image, bytes) else (image_root / image).read_bytes()).hexdigest()
        with open_picture(picture) as opened:
            opened.verify()
        load_rgb(picture)
    except FileNotFoundError:
        return _Checked(picture, "", f"image {name} does not exist in {image_root}. Add the file or mend the path.")
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        return _Checked(picture, "", f"image {name} is over the safety limit ({error}). Scale the picture down.")
    except DataError as error:
        return _Checked(picture, "", f"image {name}: {error}")
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and others.
        return _Checked(picture, "", f"image {name} cannot be decoded ({error}). Replace the file.")
    return _Checked(picture, digest, None)


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


def _record(row: Row, made: Draft, checked: Mapping[str | bytes, _Checked], groups: Mapping[str, str]) -> Record:
    digests = tuple(checked[image].sha256 for image in made.images)
    return Record(
        id=row.id,
        images=tuple(checked[image].picture for image in made.images),
        turns=made.turns,
        source=row.source,
        group=f"image:{groups[digests[0]]}" if digests else f"text:{row.id}",
        digests=digests,
        format=made.format,
        options=made.options,
        tags=made.tags,
    )
