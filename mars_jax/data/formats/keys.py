"""Keys of rows, turns and parts that a format does not read: refused where they change what a row means, else named.

A key whose value is absent (see `values.stands_for_nothing`) counts as absent, since tables fill such values in. Names
are compared without their case, spaces, "_" and "-".
"""

import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from itertools import product
from string import ascii_lowercase
from typing import NamedTuple

from mars_jax.data.formats.base import FaultError, Keys
from mars_jax.data.values import is_absent, number_of, stands_for_nothing
from mars_jax.runtime.text import short

SYSTEM = ("system", "system_prompt", "system_message")
"""Columns with the text of a system turn, in every format."""

COMMON = frozenset({"id", "question_id", "index", "image", "images", "category", *SYSTEM})
"""Keys of a row that all formats read."""

LEARN = ("loss", "weight", "train")
"""Keys of a turn that say whether it is trained on: true or 1, false or 0."""

CONVERSATIONS = ("conversations", "messages")
"""Columns that hold a list of turns; a row has one of them."""

_PICTURE = frozenset({"bytes", "path", "url"})

_VIDEO = "video is not read. Give pictures of it, or leave the row out."
_AUDIO = "audio is not read. Leave the row out."
_GROUNDING = "coordinates are not put into texts. Write them into the texts, or leave the row out."
_TOOLS = "calls of tools are not read. Write them into the texts, or leave the row out."
_THINKING = "reasoning is not read. Write it into the answer, or take the key out."
_PREFERENCE = "pairs and labels of preference are not read. Keep the good answers alone, as conversations."
_WEIGHT = f"training weights are read from turns alone, as {', '.join(LEARN)}. Set them there, or take the key out."
_PART_WEIGHT = "a part is trained on with its turn. Set it in the turn, or take the key out."
_TEMPLATE = "what changes the chat template is not read. Take the key out."
_PIXELS = "pictures have no sizes of their own. Scale the file itself, or set data.max_pixels."
_SYSTEM = f"system texts are read from the row's {', '.join(SYSTEM)}, or from a turn. Rename the key, or take it out."
_HISTORY = "earlier turns are not read from here. Write them into the conversation."
_NUMBERED = "pictures are read from 'image' and 'images'. Give them there, one <image> for each, or take the key out."

_OPTIONS = "options are read from 'choices' or 'options', as a list, or from columns A, B, ... Give them so."
_SECOND_OPTIONS = "the options of this row are read from elsewhere. Keep those that are asked, and take the others out."
_ASKED = "only 'question' is asked, with its options. Write it in there."


@lru_cache(maxsize=4096)  # the same few keys stand in every row
def _plain(key: str) -> str:
    return re.sub(r"[\s_-]+", "", key).lower()


def _reasons(table: Mapping[str, str]) -> Mapping[str, str]:
    """The table with the plain names of its keys."""
    return {_plain(key): reason for key, reason in table.items()}


def _names(*names: str) -> frozenset[str]:
    return frozenset(map(_plain, names))


# Marks of training under names that are not read: those that mean "trained on", and those that mean "not".
_TRAINS: tuple[str, ...] = ("training", "should_train", "is_trainable", "train_on", "do_train", "learn", "supervised")
_TRAINS += ("is_supervised", "compute_loss", "calculate_loss", "calc_loss", "use_loss", "has_loss", "is_target")
_SKIPS = ("no_loss", "ignore_loss", "skip", "mask", "masked", "is_masked", "ignore", "ignored", "exclude", "excluded")

_MISNAMED_SYSTEM: tuple[str, ...] = ("system_text", "system_content", "system_msg", "system_instruction")
_MISNAMED_SYSTEM += ("system_instructions", "sys_prompt", "sys_msg")

_ANYWHERE = _reasons(
    {
        **dict.fromkeys((*SYSTEM, *_MISNAMED_SYSTEM), _SYSTEM),
        **dict.fromkeys(("video", "videos", "video_path", "video_url", "video_file", "fps", "nframes"), _VIDEO),
        **dict.fromkeys(("audio", "audios", "audio_path", "audio_url", "audio_file", "input_audio", "speech"), _AUDIO),
        **dict.fromkeys(
            ("objects", "bbox", "bboxes", "box", "boxes", "bounding_box", "bounding_boxes", "ref"), _GROUNDING
        ),
        **dict.fromkeys(("bounding_boxes_sequence", "boxes_seq", "box_x1y1x2y2", "bbox_2d", "point_2d"), _GROUNDING),
        **dict.fromkeys(("tools", "tool", "functions", "function", "function_call", "function_calls"), _TOOLS),
        **dict.fromkeys(("tool_calls", "tool_call", "tool_call_id", "tool_choice", "tool_responses"), _TOOLS),
        "reasoning_content": _THINKING,
        **dict.fromkeys(("kto_tag", "preference"), _PREFERENCE),
        **dict.fromkeys(("loss_weight", "sample_weight", "loss_scale", "loss_mask", "trainable"), _WEIGHT),
        **dict.fromkeys(("train_detail", "training_detail", "mask_history", "train_on_turn"), _WEIGHT),
        **dict.fromkeys(("chat_template", "chat_template_kwargs", "enable_thinking", "documents"), _TEMPLATE),
        **dict.fromkeys(("min_pixels", "max_pixels", "total_pixels", "resized_height", "resized_width"), _PIXELS),
        **dict.fromkeys(("crop", "crop_box"), _PIXELS),
        "history": _HISTORY,
    }
)
_IN_TURN = _reasons(
    {
        **dict.fromkeys(("reasoning", "thinking", "thought", "thoughts"), _THINKING),
        **dict.fromkeys(("image", "images", "image_url", "image_urls", "files", "attachments"), _NUMBERED),
        **dict.fromkeys((*_TRAINS, *_SKIPS), _WEIGHT),
    }
)
_IN_PART = _reasons(dict.fromkeys(("source", "file", "file_id", "data", "input_image", "image_file"), _NUMBERED))
# Marks of a row, refused by their values.
_ROW_TRAINS, _ROW_SKIPS = _names(*_TRAINS), _names(*_SKIPS)
_RIGHT = _names("is_correct", "is_right", "is_good", "is_chosen", "is_preferred", "desirable", "is_desirable")
# Texts beside a question.
_BESIDE = ("hint", "context", "passage", "paragraph", "article", "background", "premise", "instruction", "instructions")
_NUMBERED_PICTURE = re.compile(r"(image|img)[0-9]+")
# Where a row has no picture: names of columns with one, and values that are one.
_PICTURE_FACTS = ("id", "name", "path", "url", "list", "bytes", "base64", "b64", "base64str")
_PICTURE_ENDS = ("", "file", "files", *map("".join, product(("", "file"), _PICTURE_FACTS, ("", "s"))))
_PICTURE_NAMES = frozenset(
    map("".join, product(("image", "img", "picture", "photo", "figure"), ("", "s"), _PICTURE_ENDS))
)
_PICTURE_FILE = re.compile(r"[^\n]{1,500}\.(jpe?g|png|webp|gif|bmp|tiff?)", re.IGNORECASE)

OPTION_LISTS = ("choices", "options")
"""Columns of a row that hold its options as a list."""
# Options of a question under names that no format reads.
_OPTION_WORDS: tuple[str, ...] = ("candidates", "distractor", "distractors", "mc", "mcs", "endings", "alternatives")
_OPTION_WORDS += ("opts", "multichoice", "multiplechoice", "sol1", "sol2")
_OPTION_KINDS = ("answer", "mc", "multi", "multiple", "candidate", "possible", "wrong", "incorrect", "negative")
_OPTION_TEXTS = product(("option", "options", "choice", "choices"), ("list", "text", "texts"))
_OPTION_PLURALS = product(_OPTION_KINDS, ("answers", "options", "choices"))
_OPTION_NAMES = frozenset((*_OPTION_WORDS, *map("".join, (*_OPTION_PLURALS, *_OPTION_TEXTS))))
# One option each, as in MedMCQA ("opa") and Social IQa ("answerA").
_NUMBERED_OPTION = re.compile(
    r"(option|choice)s?([a-z]|[0-9]+)|opt?([a-h]|[0-9]+)|answer[a-e]|(distractor|ending)s?[0-9]+"
)
# Of these another spelling beside is a fact: what it holds changes no text, and pictures are judged by `_row_reason`.
_FACTS = frozenset({"id", "questionid", "index", "category", "image", "images"})
_WORDS = {"true": 1.0, "yes": 1.0, "false": 0.0, "no": 0.0}

MOST_FAULTS = 3
"""Faults of one kind that a row is given."""


def unread_keys(row: Mapping[str, object], keys: Keys) -> tuple[str, ...]:
    """Names of the keys that a format does not read, turns' and parts' after the name of their column.

    Raises:
        FaultError: such a key changes what the row means.
    """
    names: list[str] = []
    faults: list[str] = []
    for unread in _unread(row, keys):
        reason = _reason(unread, row, keys)
        if reason:
            faults.append(f"{unread.where}{short(unread.key)} is {short(unread.value)}: {reason}")
        else:
            names.append(f"{unread.column}.{unread.key}" if unread.column else unread.key)
    if faults:
        raise FaultError(*faults[:MOST_FAULTS])
    return tuple(names)


class _Unread(NamedTuple):
    """A key that is not read and has a value.

    Attributes:
        where: it stands, for messages.
        column: of the row that it is in, and the key of the turn whose parts it is in; "" for a key of the row itself.
        key: as it is written.
        value: of the key.
        known: keys that are read there.
    """

    where: str
    column: str
    key: str
    value: object
    known: frozenset[str]


def _unread(row: Mapping[str, object], keys: Keys) -> Iterator[_Unread]:
    """Each key that is not read and has a value."""

    def others(where: str, column: str, item: object, known: frozenset[str]) -> Iterator[_Unread]:
        for key, value in item.items() if isinstance(item, dict) else ():
            if key not in known and not stands_for_nothing(value):
                yield _Unread(where, column, str(key), value, known)

    yield from others("", "", row, keys.row | COMMON | {keys.turns})
    for column in ("image", "images"):
        value = row.get(column)
        for picture in value if isinstance(value, list) else [value]:
            yield from others(f"a picture of {column!r}: ", column, picture, _PICTURE)
    turns = row.get(keys.turns)
    for number, turn in enumerate(turns if isinstance(turns, list) else ()):
        yield from others(f"turn {number}: ", keys.turns, turn, keys.turn | {*LEARN})
        parts = turn.get(keys.parts) if isinstance(turn, dict) else None
        for part in parts if isinstance(parts, list) else ():
            name = f"{keys.turns}.{keys.parts}"
            yield from others(f"turn {number}, a part: ", name, part, keys.part)
            if isinstance(part, dict):
                for source in (part.get(key) for key in ("image", "image_url")):
                    yield from others(f"turn {number}, a picture: ", name, source, _PICTURE)


def _reason(unread: _Unread, row: Mapping[str, object], keys: Keys) -> str:
    """Why a key can't be left unread, or ""."""
    reason = _nested_reason(unread) if unread.column else _row_reason(unread.key, unread.value, row, keys)
    name = _plain(unread.key)
    if reason or name in LEARN or name in _FACTS:
        return reason
    meant = next((known for known in sorted(unread.known) if _plain(known) == name), "")
    return f"it is read as {meant!r} alone. Rename it, or take it out." if meant else ""


def _nested_reason(unread: _Unread) -> str:
    """Why a key of a turn, part or picture can't be left unread by its name, or ""."""
    name = _plain(unread.key)
    of_part = _IN_PART.get(name, "") if "." in unread.column else ""
    if reason := _reason_anywhere(name) or _IN_TURN.get(name) or of_part:
        return reason
    if name in LEARN:
        meant = f"it is read as {name!r} alone. Rename it." if name in unread.known else _PART_WEIGHT
        return "" if _mark(unread.value) == 1 else meant
    return ""


def _reason_anywhere(name: str) -> str:
    """Why a key of this plain name can't be left unread wherever it stands, or ""."""
    return _PREFERENCE if name.startswith(("rejected", "chosen")) else _ANYWHERE.get(name, "")


def _row_reason(key: str, value: object, row: Mapping[str, object], keys: Keys) -> str:
    """Why a key of a row can't be left unread, or ""."""
    name = _plain(key)
    if reason := _reason_anywhere(name) or _mark_reason(name, value, keys):
        return reason
    if name in CONVERSATIONS:
        if keys.turns and not is_absent(row.get(keys.turns)):
            return "the row has two conversations. Take one of them out."
        return f"it is read as {name!r} alone. Rename it." if key != name else ""
    if not keys.turns:
        if key in OPTION_LISTS:
            return _SECOND_OPTIONS
        if name in _OPTION_NAMES or _NUMBERED_OPTION.fullmatch(name):
            return _OPTIONS
        if key in ascii_lowercase and not any(is_absent(row.get(letter)) for letter in "ab"):
            return _OPTIONS
        if name in _BESIDE:
            return _ASKED
    if _NUMBERED_PICTURE.fullmatch(name):
        return _NUMBERED
    has_none = is_absent([row.get("image"), row.get("images")])
    if _holds_picture(value) or (has_none and (name in _PICTURE_NAMES or _is_picture_file(value))):
        return _NUMBERED
    return ""


def _mark_reason(name: str, value: object, keys: Keys) -> str:
    """Why a row with this value of a mark, of training or of preference, can't be read without it, or ""."""
    mark = _mark(value)
    if name in LEARN and mark != 1:
        return _WEIGHT
    if (name in _ROW_TRAINS and mark not in (None, 1)) or (name in _ROW_SKIPS and mark == 1):
        return _WEIGHT
    if name in _RIGHT and mark not in (None, 1):
        return _PREFERENCE
    if name == "label":
        # Beside a question it may be a class, in words or as a number.
        is_flag = isinstance(value, bool) or (isinstance(value, str) and value.strip().lower() in ("true", "false"))
        return _PREFERENCE if is_flag or (keys.turns and number_of(value) in (0, 1)) else ""
    return ""


def _mark(value: object) -> float | None:
    """The number that a mark stands for: true and yes are 1, false and no are 0. None if it is none."""
    word = value.strip().lower() if isinstance(value, str) else ""
    return _WORDS.get(word, number_of(value))


def _is_picture_file(value: object) -> bool:
    return isinstance(value, str) and bool(_PICTURE_FILE.fullmatch(value))


def _holds_picture(value: object) -> bool:
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, dict) and isinstance(first.get("bytes"), bytes)
