"""Interface of data formats, and helpers that read pictures and turns from a row.

A row is a JSON object or a row of a parquet file. A picture in it is a path below the image folder, a `data:` URI, or
parquet's {"bytes", "path"}. No picture is opened here.
"""

import base64
import binascii
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath, PureWindowsPath
from typing import Literal, NamedTuple

IMAGE_PLACEHOLDER = "<image>"
OPTION_PROMPT = "Answer with the option's letter from the given choices directly."

Role = Literal["user", "assistant", "system"]
ROLES: Mapping[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation.

    Attributes:
        role: who speaks.
        text: what is said; user text holds `<image>` where a picture goes.
        learn: for an answer, whether it is trained on. The last answer always is.
        parts: for a message of typed parts, each of them (`<image>` for a picture), which joined are `text`. Empty for
            plain text.
    """

    role: Role
    text: str
    learn: bool = True
    parts: tuple[str, ...] = ()


class Conversation(NamedTuple):
    """The conversation in a row.

    Attributes:
        turns: messages in order.
        pictures: sources of the pictures embedded in the turns, in order; None stands for the next picture of the row's
            columns `image` and `images`. Remaining pictures of these columns follow.
    """

    turns: tuple[Turn, ...]
    pictures: Sequence[object] = ()


@dataclass(frozen=True, slots=True)
class Draft:
    """An unchecked record.

    Attributes:
        format: name of the row's format.
        images: paths relative to the image folder, or encoded pictures.
        turns: the conversation.
        options: allowed texts of the last answer, each ending in its letter; empty for an open question.
        tags: (name, value) of each category of question that it belongs to; results are broken down by them.
    """

    format: str
    images: tuple[str | bytes, ...]
    turns: tuple[Turn, ...]
    options: tuple[str, ...] = ()
    tags: tuple[tuple[str, str], ...] = ()


class FaultError(Exception):
    """A row cannot be read as a draft; each argument is one fault."""


def no_options(row: Mapping[str, object], turns: tuple[Turn, ...]) -> tuple[str, ...]:
    """The options of open questions: none."""
    return ()


def text_columns(row: Mapping[str, object], *names: str) -> Iterator[tuple[str, str]]:
    """(name, value) of each named column that holds a text."""
    for name in names:
        value = row.get(name)
        if isinstance(value, str):
            yield name, value


def category_tags(row: Mapping[str, object], num_pictures: int) -> Iterator[tuple[str, str]]:
    """Tags of most formats: the column `category`, if the row has it."""
    return text_columns(row, "category")


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """A data format: reads conversations from rows, and names the rules that score answers.

    Attributes:
        name: unique among formats; data summaries and sample files name it.
        detect: returns whether a row is in this format. `registry` defines the order in which formats are tried.
        read: returns the conversation of a row, from the row and the number of pictures in its columns `image` and
            `images`. Raises `FaultError`. Roles and placeholders are checked later, for all formats.
        options: returns the allowed texts of the last answer, each ending in its letter, from a row and its turns.
        tags: returns (name, value) of each category of question that a row belongs to, from the row and its number of
            pictures. Rows tagged with both `category` and `l2_category` also get means over the classes of a category.
        prompt: source of the questions' wording; recorded in evaluations.
        answer_rules: names of the rules of `evals.rules` that read generated answers, the benchmark's rule first.
    """

    name: str
    detect: Callable[[Mapping[str, object]], bool]
    read: Callable[[Mapping[str, object], int], Conversation]
    options: Callable[[Mapping[str, object], tuple[Turn, ...]], tuple[str, ...]] = no_options
    tags: Callable[[Mapping[str, object], int], Iterable[tuple[str, str]]] = category_tags
    prompt: str = "the file's own"
    answer_rules: tuple[str, ...] = ("exact",)


def column_pictures(row: Mapping[str, object], faults: list[str]) -> Iterator[str | bytes]:
    """Pictures of the columns `image` and `images`, each a source or a list of sources; faults are appended."""
    for key in ("image", "images"):
        value = row.get(key)
        for source in value if isinstance(value, list) else [value] * (value is not None):
            try:
                yield read_picture(source)
            except FaultError as error:
                faults += error.args


def read_picture(source: object) -> str | bytes:
    """The path of a picture below the image folder, or the encoded picture.

    Raises:
        FaultError: the source is neither.
    """
    if isinstance(source, dict):
        if isinstance(source.get("bytes"), bytes):
            return bytes(source["bytes"])
        source = source.get("path")
    if not isinstance(source, str) or not source:
        raise FaultError(f"image is {reprlib.repr(source)}; a path relative to the image folder is expected.")
    if source.startswith("data:"):
        try:
            return base64.b64decode(source.partition(",")[2], validate=True)
        except binascii.Error as error:
            raise FaultError(f"image {reprlib.repr(source)} is no base64 ({error}). Encode it again.") from None
    if source.startswith(("http://", "https://")):
        raise FaultError(f"image {source!r} is an address. Download the picture and give its path.")
    windows = PureWindowsPath(source)
    if PurePosixPath(source).is_absolute() or windows.is_absolute() or ".." in windows.parts:
        raise FaultError(f"image {source!r} points outside the image folder. Use a path below it, without '..'.")
    return source


def read_turns(row: Mapping[str, object], key: str, speaker: str, text: str) -> tuple[Turn, ...]:
    """The turns of a row's list of messages, after a turn with the text of its column `system`, if any.

    Args:
        row: the row.
        key: its column with the list.
        speaker: key of a message's role, one of `ROLES`.
        text: key of a message's text.

    Raises:
        FaultError: the column holds no list, or a message is malformed.
    """
    messages = row.get(key)
    if not isinstance(messages, list) or not messages:
        raise FaultError(f"{key!r} is {reprlib.repr(messages)}; a list of {{{speaker!r}, {text!r}}} turns is expected.")
    if isinstance(row.get("system"), str):
        messages = [{speaker: "system", text: row["system"]}, *messages]
    malformed = [
        f"turn {number} is {reprlib.repr(turn)}; an object with the strings {speaker!r} and {text!r} is expected."
        for number, turn in enumerate(messages)
        if not (isinstance(turn, dict) and isinstance(turn.get(speaker), str) and isinstance(turn.get(text), str))
    ] or [
        f"turn {number} is from {turn[speaker]!r}; allowed: {', '.join(ROLES)}."
        for number, turn in enumerate(messages)
        if turn[speaker] not in ROLES
    ]
    if malformed:
        raise FaultError(*malformed)
    return tuple(Turn(ROLES[turn[speaker]], turn[text]) for turn in messages)


def ask(lines: Sequence[str], answer: str, num_pictures: int) -> Conversation:
    """One question and its answer: a line for each picture's placeholder, then the lines of the question."""
    text = "\n".join([IMAGE_PLACEHOLDER] * num_pictures + list(lines))
    return Conversation((Turn("user", text), Turn("assistant", answer)))
