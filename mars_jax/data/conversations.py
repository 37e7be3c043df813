"""Checks of conversations, whatever their format, and what is put right in them: placeholders, and where they end."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from mars_jax.data.formats.base import IMAGE_PLACEHOLDER, Draft, Turn, learned
from mars_jax.runtime.text import short

MAX_CHARACTERS = 1_000_000
"""Characters of the texts of one row, together."""

MAX_TURNS = 1_000
"""Turns of one row."""

# Placeholders of other tools for what is not read; a closing tag after one makes it HTML.
_FOREIGN = re.compile(r"<((?:video|audio|speech|bbox|ref-object|boxes)\d*)>(?!.{0,2000}?</\1>)", re.DOTALL)
# Those for parts of a picture, which are words where there is none.
_REGION = re.compile(r"<((?:region|mask)\d*)>(?!.{0,2000}?</\1>)", re.DOTALL)
# Other tools' placeholders of pictures.
_OTHER_IMAGE = re.compile(
    r"<img>[^<>\n]{1,500}</img>|\[(?:img|image)\]"
    r"|(?!(?-i:<image>))<\|?(?:image|img)[ _-]?(?:\d+|here|placeholder|pad|token)?\|?>",
    re.IGNORECASE,
)
# Coordinates. Every repetition has a limit, so the time is linear in the length of the text.
_NUMBER, _SPACE = r"-?\d{1,5}(?:\.\d{1,20})?", r"\s{0,20}"
_PAIR = rf"{_SPACE}{_NUMBER}{_SPACE},{_SPACE}{_NUMBER}{_SPACE}"
_PLACE = (
    r"(?:coord(?:inate)?s?|points?|pos|positions?|locations?|(?:b|bounding_?)?box(?:es)?|cent(?:er|re))(?:_?\d|_2d)?"
)
_EDGE = r"[\"'](?:[xy]_?[12]?|[xy]_?(?:min|max)|left|right|top|bottom|(?:c|center)_?[xy])[\"']\s?:\s?[\"']?"
_ACTION = r"(?:\b|_)(?:click|tap|long_?press|drag(?:_?to)?|move_?to|mouse_?move|hover|swipe|scroll|touch)"
_BOX = re.compile(
    # Lists: [1, 2, 3, 4], (1, 2), (3, 4), [[1, 2], [3, 4]].
    rf"[\[(]{_PAIR},{_PAIR}[\])]|\({_PAIR}\),?\s?\({_PAIR}\)|\[{_SPACE}\[{_PAIR}\],{_SPACE}\[{_PAIR}\]"
    # Named lists: bbox_2d=[1, 2, 3, 4], start_box='(1, 2)', "coordinate": [1, 2].
    rf"|(?:\bb?box(?:_2d)?\"?|\bpoint_2d\"?|(?:start|end)_(?:box|point)|[\"'](?:\w{{0,20}}_)?{_PLACE}[\"'])"
    rf"\s?[:=]\s?[\"']?(?:[\[(]{_SPACE}){{1,2}}{_PAIR}"
    # Named numbers: "x": 1, "y": 2.
    rf"|{_EDGE}{_NUMBER}[\"']?,{_SPACE}{_EDGE}{_NUMBER}"
    # Actions: click(1, 2), pyautogui.moveTo(x=1, y=2), drag([1, 2], [3, 4]), click at (1, 2), tap [1, 2].
    rf"|{_ACTION}(?:\(|\s(?:at|on|to)\s\()(?:\w{{1,20}}\s?=\s?)?[\"']?[\[(]?{_NUMBER}{_SPACE},{_SPACE}(?:\w{{1,20}}=)?{_NUMBER}"
    rf"|\b(?:click|tap)\s?(?:at\s|on\s)?\[{_PAIR}\]"
    # Tags: <box>1, 2, <point x="1" y="2">.
    rf"|<\|?(?:box|box_start|bbox|points?|quad|poly)\|?>[\s\[(]{{0,5}}{_NUMBER}"
    rf"|<(?:points?|box|bbox|click|tap|region|coord\w{{0,10}})\s[^<>]{{0,80}}?\b[xy]_?(?:1|min)?\s?=\s?[\"']?{_NUMBER}",
    re.IGNORECASE,
)
# What every one of these has; looked for first, since most texts have none of it and it is found ten times as fast.
_BOX_PART = re.compile(r"\d[\s\"'\])]{0,20},|<(?!image>)")
_OPENING, _CLOSING, _LONGEST_BOX = "([{<", ")]}>", 200


class Finished(NamedTuple):
    """A conversation that is ready to be trained on.

    Attributes:
        turns: they end with an answer that is trained on.
        num_pictures: how many of the row's pictures are in them.
        changes: what was changed: keys of `notes.CHANGES`.
    """

    turns: tuple[Turn, ...]
    num_pictures: int
    changes: tuple[str, ...]


def finished(made: Draft) -> Finished:
    """A conversation without faults, with a placeholder for each picture, cut after the last answer that is learned."""
    turns = tuple(replace(turn, text=_unix_picture(turn.text)) if not turn.parts else turn for turn in made.turns)
    changes = []
    if made.images and not _placeholders(turns):
        turns, changes = _pictures_first(turns, len(made.images)), ["pictures_first"]
    end = 1 + learned(turns)[-1]
    if end < len(turns):
        changes.append("cut")
    return Finished(turns[:end], _placeholders(turns[:end]), tuple(changes))


def only_last(turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """The turns with the last answer alone trained on."""
    return (*(replace(turn, learn=False) if turn.role == "assistant" else turn for turn in turns[:-1]), turns[-1])


def has_boxes(turns: Sequence[Turn]) -> str:
    """What looks like coordinates in pixels in the texts, or "": shares of 0 to 1 are no pixels."""
    for turn in turns:
        for found in _BOX.finditer(turn.text) if _BOX_PART.search(turn.text) else ():
            box = _whole_box(turn.text, found)
            if any(abs(float(number)) > 1 for number in re.findall(r"(?<![\w.])-?\d+(?:\.\d+)?", box)):
                return box
    return ""


def _whole_box(text: str, found: re.Match[str]) -> str:
    """The text of a match of `_BOX`, whose numbers are the first ones only, up to where its brackets close."""
    depth = 0
    for place, character in enumerate(text[found.start() : found.start() + _LONGEST_BOX], start=found.start() + 1):
        depth += (character in _OPENING) - (character in _CLOSING)
        if place >= found.end() and depth <= 0 and character in _CLOSING:
            return text[found.start() : place]
    return found[0]


def oversize(turns: Sequence[Turn]) -> str:
    """The fault of a conversation that is longer than any context, or ""."""
    characters = sum(len(turn.text) for turn in turns)
    if len(turns) > MAX_TURNS:
        return f"{len(turns):,} turns, more than {MAX_TURNS:,}. Split the conversation."
    if characters > MAX_CHARACTERS:
        return f"its texts have {characters:,} characters, more than {MAX_CHARACTERS:,}. Split or shorten them."
    return ""


def conversation_faults(turns: tuple[Turn, ...], num_images: int) -> Iterator[str]:
    """The faults of a conversation with so many pictures."""
    roles = [turn.role for turn in turns]
    spoken = roles[1:] if roles[:1] == ["system"] else roles
    expected = [("user", "assistant")[number % 2] for number in range(len(spoken))]
    if "assistant" not in roles:
        yield "no assistant turn, so nothing to learn. Add the answer."
    elif roles.count("system") > 1:
        yield f"{roles.count('system')} system turns; one is read, at the start. Join them."
    elif spoken[0] != "user":
        yield f"the conversation starts with {spoken[0]!r}; after an optional system turn the user must start."
    elif spoken != expected:
        yield f"the speakers are {', '.join(roles[:10])}; user and assistant must alternate."
    elif spoken[-1] != "assistant":
        yield "the last user turn has no answer. Add it, or remove the turn."
    elif not learned(turns):
        yield "no answer is trained on: all are excluded. Mark one as trained on, or remove the record."
    for number, turn in enumerate(turns):
        yield from _text_faults(turn, f"turn {number}", num_images)
    placeholders = _placeholders(turns)
    asked = [turn.text for turn in turns if turn.role == "user"]
    other = next((found[0] for text in asked for found in [_OTHER_IMAGE.search(text)] if found), "")
    seen = f" The text has {short(other)}, which is not read." if other else ""
    if placeholders != num_images and (placeholders or not num_images or other):
        yield (
            f"{placeholders} {IMAGE_PLACEHOLDER} in the user turns but {num_images} images. Write {IMAGE_PLACEHOLDER} "
            f"once for each image.{seen}"
        )
    elif num_images and other:
        yield f"the text has {short(other)}, which is not read. Write {IMAGE_PLACEHOLDER} where a picture goes."
    elif other.lower().startswith("<img>") and other.lower().endswith("</img>"):
        yield f"the text has {short(other)}, which is not read. Give it as 'image', with <image> in the text."


def _text_faults(turn: Turn, where: str, num_images: int) -> Iterator[str]:
    if turn.role == "assistant" and not turn.text.strip():
        yield f"{where}: the answer is empty. Write it, or remove the record."
    if turn.role != "user" and IMAGE_PLACEHOLDER in turn.text:
        yield f"{where}: {IMAGE_PLACEHOLDER} in a turn of the {turn.role}; only user turns may hold it."
    foreign = _FOREIGN.search(turn.text) or (_REGION.search(turn.text) if num_images else None)
    if foreign:
        yield (
            f"{where}: {foreign[0]} stands for something that is not read ({foreign[1]}). Write what it stands for, or "
            "leave the row out."
        )


def _placeholders(turns: Sequence[Turn]) -> int:
    return sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in turns if turn.role == "user")


def _unix_picture(text: str) -> str:
    """The text with a plain line end after each placeholder, which templates set off from the text."""
    return text.replace(f"{IMAGE_PLACEHOLDER}\r\n", f"{IMAGE_PLACEHOLDER}\n")


def _pictures_first(turns: tuple[Turn, ...], count: int) -> tuple[Turn, ...]:
    """The turns with the placeholders of all pictures at the start of the first question."""
    number = next(number for number, turn in enumerate(turns) if turn.role == "user")
    turn = turns[number]
    if turn.parts:
        changed = replace(
            turn, text=IMAGE_PLACEHOLDER * count + turn.text, parts=(*[IMAGE_PLACEHOLDER] * count, *turn.parts)
        )
    else:
        changed = replace(turn, text="\n".join([*[IMAGE_PLACEHOLDER] * count, turn.text]))
    return (*turns[:number], changed, *turns[number + 1 :])
