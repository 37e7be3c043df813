"""Keys of rows, turns and parts that a format does not read: refused where they change what a row means, else named.

A key whose value is absent (see `values.is_absent`) counts as absent, since tables fill such values in.
"""

import re
from collections.abc import Iterator, Mapping
from itertools import product

from mars_jax.data.formats.base import FaultError, Keys
from mars_jax.data.values import is_absent, is_blank
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
_TEMPLATE = "what changes the chat template is not read. Take the key out."
_PIXELS = "pictures have no sizes of their own. Scale the file itself, or set data.max_pixels."
_HISTORY = "earlier turns are not read from here. Write them into the conversation."
_NUMBERED = "pictures are read from 'image' and 'images'. Give them there, one <image> for each, or take the key out."

_OPTIONS = "options are read from 'choices' or 'options', as a list, or from columns A, B, ... Give them so."
_SECOND_OPTIONS = "the options of this row are read from elsewhere. Keep those that are asked, and take the others out."
_ASKED = "only 'question' is asked, with its options. Write it in there."

_ANYWHERE = {
    **dict.fromkeys(("video", "videos", "video_path", "video_url", "video_file", "fps", "nframes"), _VIDEO),
    **dict.fromkeys(("audio", "audios", "audio_path", "audio_url", "audio_file", "input_audio", "speech"), _AUDIO),
    **dict.fromkeys(("objects", "bbox", "bboxes", "box", "boxes", "bounding_box", "bounding_boxes", "ref"), _GROUNDING),
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
_IN_TURN = {
    **dict.fromkeys(("reasoning", "thinking", "thought", "thoughts"), _THINKING),
    **dict.fromkeys(("image", "images", "image_url", "image_urls", "files", "attachments"), _NUMBERED),
    **dict.fromkeys(("training", "should_train", "is_trainable", "learn", "compute_loss", "no_loss", "skip"), _WEIGHT),
    **dict.fromkeys(("mask", "masked", "is_masked", "ignore", "ignored", "ignore_loss"), _WEIGHT),
}
_IN_PART = dict.fromkeys(("source", "file", "file_id", "data", "input_image", "image_file"), _NUMBERED)
# Texts beside a question.
_BESIDE = ("hint", "context", "passage", "paragraph", "article", "background", "premise", "instruction", "instructions")
_NUMBERED_PICTURE = re.compile(r"(image|img)_*[0-9]+")
# Where a row has no picture: names of columns with one, and values that are one.
_PICTURE_FACTS = ("id", "name", "path", "url", "list", "bytes", "base64", "b64", "base64_str")
_PICTURE_ENDS = ("", "file", "files", *map("".join, product(("", "_", "file", "file_"), _PICTURE_FACTS, ("", "s"))))
_PICTURE_NAMES = frozenset(
    map("".join, product(("image", "img", "picture", "photo", "figure"), ("", "s"), ("", "_"), _PICTURE_ENDS))
)
_PICTURE_FILE = re.compile(r"[^\n]{1,500}\.(jpe?g|png|webp|gif|bmp|tiff?)", re.IGNORECASE)

_OPTION_LISTS = ("choices", "options")
# Options of a question under names that no format reads.
_OPTION_WORDS = ("candidates", "distractor", "distractors", "mc", "mcs")
_CHOICE_WORDS = ("multi_choice", "multi_choices", "multiple_choice", "multiple_choices")
_OPTION_KINDS = ("answer", "mc", "multiple", "candidate", "wrong", "incorrect", "negative")
_OPTION_PLURALS = map("".join, product(_OPTION_KINDS, ("", "_"), ("answers", "options", "choices")))
_OPTION_NAMES = frozenset((*_OPTION_LISTS, *_OPTION_WORDS, *_CHOICE_WORDS, *_OPTION_PLURALS))
# "optionS" would be "options".
_NUMBERED_OPTION = re.compile(r"(option|choice)s?[_ ]?([a-rt-z]|[0-9]+)|distractors?_?[0-9]+")

MOST_FAULTS = 3
"""Faults of one kind that a row is given."""


def unread_keys(row: Mapping[str, object], keys: Keys) -> tuple[str, ...]:
    """Names of the keys that a format does not read, turns' and parts' after the name of their column.

    Raises:
        FaultError: such a key changes what the row means.
    """
    names: list[str] = []
    faults: list[str] = []
    for where, name, key, value in _unread(row, keys):
        reason = _reason(name, key) if name else _row_reason(key, value, row, keys)
        if reason:
            faults.append(f"{where}{short(key)} is {short(value)}: {reason}")
        else:
            names.append(f"{name}.{key}" if name else key)
    if faults:
        raise FaultError(*faults[:MOST_FAULTS])
    return tuple(names)


def _unread(row: Mapping[str, object], keys: Keys) -> Iterator[tuple[str, str, str, object]]:
    """(where, column, key, value) of each key that is not read and has a value."""

    def others(item: object, known: frozenset[str]) -> Iterator[tuple[str, object]]:
        for key, value in item.items() if isinstance(item, dict) else ():
            if key not in known and not is_absent(value):
                yield str(key), value

    turn_keys = keys.turn | {*LEARN}
    for key, value in others(row, keys.row | COMMON | {keys.turns}):
        if not (_plain(key) in _BESIDE and is_blank(value)):
            yield "", "", key, value
    for column in ("image", "images"):
        value = row.get(column)
        for picture in value if isinstance(value, list) else [value]:
            for key, value in others(picture, _PICTURE):
                yield f"a picture of {column!r}: ", column, key, value
    turns = row.get(keys.turns)
    for number, turn in enumerate(turns if isinstance(turns, list) else ()):
        for key, value in others(turn, turn_keys):
            yield f"turn {number}: ", keys.turns, key, value
        parts = turn.get(keys.parts) if isinstance(turn, dict) else None
        for part in parts if isinstance(parts, list) else ():
            name = f"{keys.turns}.{keys.parts}"
            for key, value in others(part, keys.part):
                yield f"turn {number}, a part: ", name, key, value
            if isinstance(part, dict):
                for source in (part.get(key) for key in ("image", "image_url")):
                    for key, value in others(source, _PICTURE):
                        yield f"turn {number}, a picture: ", name, key, value


def _reason(name: str, key: str) -> str:
    """Why a key of a turn, part or picture can't be left unread, or ""."""
    plain = _plain(key)
    of_part = _IN_PART.get(plain, "") if "." in name else ""
    return _reason_anywhere(plain) or _IN_TURN.get(plain) or of_part


def _reason_anywhere(name: str) -> str:
    """Why a key of this plain name can't be left unread wherever it stands, or ""."""
    return _PREFERENCE if name.startswith(("rejected", "chosen")) else _ANYWHERE.get(name, "")


def _row_reason(key: str, value: object, row: Mapping[str, object], keys: Keys) -> str:
    """Why a key of a row can't be left unread, or ""."""
    name = _plain(key)
    if reason := _reason_anywhere(name):
        return reason
    if name == "label" and keys.turns and value in (True, False):
        return _PREFERENCE
    if name in LEARN and isinstance(value, bool | int | float) and value != 1:
        return _WEIGHT
    if name in CONVERSATIONS:
        return "the row has two conversations. Take one of them out."
    if not keys.turns:
        if key in _OPTION_LISTS:
            return _SECOND_OPTIONS
        if name in _OPTION_NAMES or _NUMBERED_OPTION.fullmatch(name):
            return _OPTIONS
        if name in _BESIDE:
            return _ASKED
    if _NUMBERED_PICTURE.fullmatch(name):
        return _NUMBERED
    has_none = is_absent([row.get("image"), row.get("images")])
    if _holds_picture(value) or (has_none and (name in _PICTURE_NAMES or _is_picture_file(value))):
        return _NUMBERED
    return ""


def _is_picture_file(value: object) -> bool:
    return isinstance(value, str) and bool(_PICTURE_FILE.fullmatch(value))


def _plain(key: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", key).lower().replace("-", "_")


def _holds_picture(value: object) -> bool:
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, dict) and isinstance(first.get("bytes"), bytes)
