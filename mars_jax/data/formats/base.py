"""Rows of the formats that people have to drafts of records: which pictures, which turns. Detected by their keys.

`llava`      {"id", "image": name or names, "conversations": [{"from": "human"|"gpt"|..., "value"}]}; "images" and a
             "system" text as in ShareGPT files are the same
`llava_scienceqa`  the same of ScienceQA's questions: the last lists "Options: (A) ... (B) ...", and its answer is the
             letter, alone or as "The answer is X."; with a lecture before it the record is `llava`
`messages`   {"messages": [{"role", "content": text or parts}], "images": names}; parts are {"type": "text", "text"} and
             {"type": "image", ...}, whose picture is in the part or the next of "images"
`scienceqa`  {"question", "choices", "answer": number, "hint", "image", ...}
`mmstar`     {"question": text with its options, "answer": letter, "image", "category", ...}

A picture is a path below the image folder, a `data:` URI, or parquet's {"bytes", "path"}. Nothing is opened here.
"""

import base64
import binascii
import re
import reprlib
import string
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any, Literal

IMAGE_PLACEHOLDER = "<image>"
OPTION_PROMPT = "Answer with the option's letter from the given choices directly."
# Whose prompt a format's questions are put in; those of the others are the file's own.
PROMPTS = {"scienceqa": "lmms-eval's of ScienceQA", "mmstar": "lmms-eval's of MMStar"}

Format = Literal["llava", "llava_scienceqa", "messages", "scienceqa", "mmstar"]
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
    """One message of a conversation; user text holds `<image>` where a picture goes."""

    role: Role
    text: str


@dataclass(frozen=True, slots=True)
class Draft:
    """What a row says.

    Attributes:
        format: that the row is in.
        images: paths relative to the image folder, or encoded pictures.
        turns: the conversation.
        options: texts that the last answer is one of, each ending in its letter; empty where it isn't one of few.
        tags: kinds of question that it belongs to, as (name, value): results are told by them.
    """

    format: Format
    images: tuple[str | bytes, ...]
    turns: tuple[Turn, ...]
    options: tuple[str, ...] = ()
    tags: tuple[tuple[str, str], ...] = ()


class FaultError(Exception):
    """Rows that can't be a draft; each argument is a fault."""


def detect(value: Mapping[str, Any]) -> Format:
    """The format of a row by its keys; `llava` where nothing else fits."""
    keys = set(value)
    if "messages" in keys:
        return "messages"
    if {"question", "choices", "answer"} <= keys:
        return "scienceqa"
    if {"question", "answer", "image"} <= keys and "conversations" not in keys:
        return "mmstar"
    return "llava"


def draft(value: Any) -> Draft:
    """Reads a row.

    Raises:
        FaultError: with every fault of its form; whether the conversation makes sense isn't checked here.
    """
    if not isinstance(value, dict):
        raise FaultError(f"the record is a JSON {type(value).__name__}; an object with 'conversations' is expected.")
    kind = detect(value)
    faults: list[str] = []
    images = tuple(_images(value, faults))
    readers = {"llava": _llava, "messages": _messages, "scienceqa": _scienceqa, "mmstar": _mmstar}
    try:
        turns, inline = readers[kind](value, len(images))
    except FaultError as error:
        raise FaultError(*faults, *error.args) from None
    sources = iter(images)
    ordered: list[str | bytes] = []
    for source in inline:
        try:
            ordered.append(next(sources) if source is None else _image(source))
        except StopIteration:
            faults.append(f"more pictures in 'messages' than the {len(images)} of 'images'. Add the missing ones.")
            break
        except FaultError as error:
            faults += error.args
    if faults:
        raise FaultError(*faults)
    pictures = (*ordered, *sources)
    options = _listed(turns) if kind == "llava" else _options(kind, value)
    tags = tuple(_tags(kind, value, len(pictures)))
    return Draft("llava_scienceqa" if kind == "llava" and options else kind, pictures, turns, options, tags)


def _listed(turns: tuple[Turn, ...]) -> tuple[str, ...]:
    """The answers that the last question allows, where it lists its options as LLaVA's ScienceQA files do."""
    if [turn.role for turn in turns[-2:]] != ["user", "assistant"]:
        return ()
    listed = re.search(r"^Options: (\(A\) .*)$", turns[-2].text, re.MULTILINE)
    answer = re.fullmatch(r"(The answer is )?([A-Z])(\.?)", turns[-1].text.strip())
    letters = ""
    for letter in re.findall(r"\(([A-Z])\) ", listed[1]) if listed else ():
        # Choices may hold such letters themselves; those of the list come in order.
        letters += letter if letter == string.ascii_uppercase[len(letters)] else ""
    if answer is None or answer[2] not in letters:
        return ()
    return tuple(f"{answer[1] or ''}{letter}{answer[3]}" for letter in letters)


def _options(kind: Format, value: Mapping[str, Any]) -> tuple[str, ...]:
    if kind == "scienceqa":
        return tuple(string.ascii_uppercase[: len(value["choices"])])
    return tuple("ABCD") if kind == "mmstar" else ()


def _tags(kind: Format, value: Mapping[str, Any], num_images: int) -> Iterator[tuple[str, str]]:
    """ScienceQA's are the columns of its tables: of a question with a picture and a hint, both contexts are true."""
    for name in {"scienceqa": ("subject",), "mmstar": ("category", "l2_category")}.get(kind, ("category",)):
        if isinstance(value.get(name), str):
            yield name, value[name]
    if kind == "scienceqa":
        contexts = [("text", bool(_hint(value))), ("image", num_images > 0)]
        yield from [("context", name) for name, there in contexts if there] or [("context", "none")]
        number = str(value.get("grade", "")).removeprefix("grade")
        if number.isdecimal():
            yield "grade", "1-6" if int(number) <= 6 else "7-12"


def _hint(value: Mapping[str, Any]) -> str:
    return str(value.get("hint") or "").strip()


def _images(value: Mapping[str, Any], faults: list[str]) -> Iterator[str | bytes]:
    for key in ("image", "images"):
        found = value.get(key)
        for source in found if isinstance(found, list) else [found] * (found is not None):
            try:
                yield _image(source)
            except FaultError as error:
                faults += error.args


def _image(source: Any) -> str | bytes:
    """A path that stays below the image folder, or an encoded picture."""
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


_Read = tuple[tuple[Turn, ...], list[Any]]
"""Turns, and a source for each picture that the turns hold themselves: None for the next one of the row."""


def _llava(value: Mapping[str, Any], count: int) -> _Read:
    return _turns(value, "conversations", "from", "value"), []


def _turns(value: Mapping[str, Any], key: str, speaker: str, text: str) -> tuple[Turn, ...]:
    turns = value.get(key)
    if not isinstance(turns, list) or not turns:
        raise FaultError(f"{key!r} is {reprlib.repr(turns)}; a list of {{{speaker!r}, {text!r}}} turns is expected.")
    if isinstance(value.get("system"), str):
        turns = [{speaker: "system", text: value["system"]}, *turns]
    malformed = [
        f"turn {number} is {reprlib.repr(turn)}; an object with the strings {speaker!r} and {text!r} is expected."
        for number, turn in enumerate(turns)
        if not (isinstance(turn, dict) and isinstance(turn.get(speaker), str) and isinstance(turn.get(text), str))
    ] or [
        f"turn {number} is from {turn[speaker]!r}; allowed: {', '.join(ROLES)}."
        for number, turn in enumerate(turns)
        if turn[speaker] not in ROLES
    ]
    if malformed:
        raise FaultError(*malformed)
    return tuple(Turn(ROLES[turn[speaker]], turn[text]) for turn in turns)


def _messages(value: Mapping[str, Any], count: int) -> _Read:
    """Content may be a text, where `<image>` stands for the next of `images`, or a list of parts."""
    messages, inline, plain = value["messages"], [], []
    for number, message in enumerate(messages if isinstance(messages, list) else ()):
        parts = message.get("content") if isinstance(message, dict) else None
        if not isinstance(parts, list):
            plain.append(message)
            if isinstance(parts, str):
                inline += [None] * parts.count(IMAGE_PLACEHOLDER)
            continue
        texts = []
        for part in parts:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind == "text" and isinstance(part.get("text"), str):
                if IMAGE_PLACEHOLDER in part["text"]:
                    raise FaultError(
                        f"turn {number}: {IMAGE_PLACEHOLDER} in the text of a typed part, where pictures are parts of "
                        "their own. Remove it."
                    )
                texts.append(part["text"])
            elif kind in ("image", "image_url"):
                texts.append(IMAGE_PLACEHOLDER)
                inline.append(_source(part))
            else:
                raise FaultError(
                    f"turn {number}: a part is {reprlib.repr(part)}; parts of type 'text' and 'image' are supported."
                )
        plain.append({**message, "content": "".join(texts)})
    return _turns({**value, "messages": plain}, "messages", "role", "content"), inline


def _source(part: Mapping[str, Any]) -> Any:
    """What a typed part says of its picture, if anything."""
    for key in ("image", "path", "url", "base64", "image_url"):
        found = part.get(key)
        if isinstance(found, dict) and "url" in found:
            found = found["url"]
        if found is not None:
            return f"data:;base64,{found}" if key == "base64" else found
    return None


def _scienceqa(value: Mapping[str, Any], count: int) -> _Read:
    """Prompt and answer as lmms-eval has them: options by letter, and the letter alone."""
    choices, answer = value["choices"], value["answer"]
    letters = string.ascii_uppercase
    if not (isinstance(choices, list) and 2 <= len(choices) <= len(letters)):
        raise FaultError(f"'choices' is {reprlib.repr(choices)}; a list of 2 to {len(letters)} texts is expected.")
    if not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise FaultError(
            f"'answer' is {answer!r}; the number of one of the {len(choices)} choices, from 0, is expected."
        )
    hint = _hint(value)
    options = [f"{letter}. {choice}" for letter, choice in zip(letters, choices, strict=False)]
    lines = [*([f"Context: {hint}"] if hint else []), str(value["question"]), *options, OPTION_PROMPT]
    return _asked(lines, letters[answer], count)


def _mmstar(value: Mapping[str, Any], count: int) -> _Read:
    return _asked([str(value["question"]), OPTION_PROMPT], str(value["answer"]), count)


def _asked(lines: list[str], answer: str, count: int) -> _Read:
    text = "\n".join([IMAGE_PLACEHOLDER] * count + lines)
    return (Turn("user", text), Turn("assistant", answer)), []
