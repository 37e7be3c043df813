"""Interface of data formats, and helpers that make their conversations.

A row is a JSON object, a row of a table (parquet, Arrow, CSV, TSV), or one that a known folder of files makes.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from mars_jax.runtime.text import json_type, short

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
        text: of the message; user text holds `<image>` where a picture goes.
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
        options: allowed texts of the last answer that is learned, each ending in its letter; empty for an open
            question.
    """

    turns: tuple[Turn, ...]
    pictures: Sequence[object] = ()
    options: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Draft:
    """An unchecked record.

    Attributes:
        format: name of the row's format.
        images: paths as the row has them, or encoded pictures.
        turns: the conversation.
        options: allowed texts of the last answer, each ending in its letter; empty for an open question.
        tags: (name, value) of each category of question that it belongs to; results are broken down by them.
        unread: names of the row's keys that were not read, turns' and parts' as "messages.name".
    """

    format: str
    images: tuple[str | bytes, ...]
    turns: tuple[Turn, ...]
    options: tuple[str, ...] = ()
    tags: tuple[tuple[str, str], ...] = ()
    unread: tuple[str, ...] = ()


class FaultError(Exception):
    """A row cannot be read as a draft; each argument is one fault."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Keys:
    """The keys that a format reads. Of the others, those that change what a row means are refused, the rest counted.

    Attributes:
        row: of a row, besides those that all formats read: `keys.COMMON`.
        turns: the column that holds a list of turns, if any.
        turn: of a turn, besides those that say whether it is trained on: `keys.LEARN`.
        parts: the key of a turn that may hold a list of typed parts, if any.
        part: of a typed part.
    """

    row: frozenset[str]
    turns: str = ""
    turn: frozenset[str] = frozenset()
    parts: str = ""
    part: frozenset[str] = frozenset()


def text_columns(row: Mapping[str, object], *names: str) -> Iterator[tuple[str, str]]:
    """(name, value) of each named column that holds a text or a whole number."""
    for name in names:
        value = row.get(name)
        if isinstance(value, str | int) and not isinstance(value, bool):
            yield name, str(value)


def category_tags(row: Mapping[str, object], num_pictures: int) -> Iterator[tuple[str, str]]:
    """Tags of most formats: the column `category`, if the row has it."""
    return text_columns(row, "category")


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """A data format: reads conversations from rows, and names the rules that score answers.

    Attributes:
        name: unique among formats; data summaries and sample files name it.
        keys: the keys that it reads; no other is dropped in silence.
        detect: returns whether a row is in this format. `registry` defines the order in which formats are tried.
        read: returns the conversation of a row, from the row and the number of pictures in its columns `image` and
            `images`. Raises `FaultError`. Roles and placeholders are checked later, for all formats.
        tags: returns (name, value) of each category of question that a row belongs to, from the row and its number of
            pictures. Rows tagged with both `category` and `l2_category` also get means over the classes of a category.
        prompt: source of the questions' wording; recorded in evaluations.
        answer_rules: names of the rules of `evals.rules` that read generated answers, the benchmark's rule first.
    """

    name: str
    keys: Keys
    detect: Callable[[Mapping[str, object]], bool]
    read: Callable[[Mapping[str, object], int], Conversation]
    tags: Callable[[Mapping[str, object], int], Iterable[tuple[str, str]]] = category_tags
    prompt: str = "the file's own"
    answer_rules: tuple[str, ...] = ("exact",)


def text_of(row: Mapping[str, object], key: str) -> str:
    """The text in a column that must hold one.

    Raises:
        FaultError: it holds none, or something else.
    """
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        what = "empty" if isinstance(value, str) else f"{short(value)} ({json_type(value)})"
        raise FaultError(f"{key!r} is {what}; a text is expected. Write it as text, or leave the row out.")
    return value


def learned(turns: Sequence[Turn]) -> list[int]:
    """Numbers of the turns that are learned: answers that are trained on."""
    return [number for number, turn in enumerate(turns) if turn.role == "assistant" and turn.learn]


def ask(lines: Sequence[str], answer: str, num_pictures: int, options: str = "") -> Conversation:
    """One question and its answer: placeholders of the pictures unless the lines hold them, then the lines.

    Args:
        lines: of the question.
        answer: to it.
        num_pictures: pictures of the row.
        options: letters that may be answered; "" for an open question.
    """
    embedded = any(IMAGE_PLACEHOLDER in line for line in lines)
    text = "\n".join([IMAGE_PLACEHOLDER] * (0 if embedded else num_pictures) + list(lines))
    return Conversation((Turn("user", text), Turn("assistant", answer)), options=tuple(options))
