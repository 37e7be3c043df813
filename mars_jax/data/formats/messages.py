"""Chat messages: {"messages": [{"role", "content": text or parts}], "images": paths}.

In a text, `<image>` stands for the next of `images`. Parts are {"type": "text", "text"} and {"type": "image", ...}; an
image part holds its picture or stands for the next of `images`. Qwen's parts, {"text"} and {"image"}, lack the type.
"""

from collections.abc import Mapping
from dataclasses import replace

from mars_jax.data.formats.base import IMAGE_PLACEHOLDER, Conversation, FaultError, Format, Keys
from mars_jax.data.formats.turns import read_turns
from mars_jax.data.values import is_absent
from mars_jax.runtime.text import short

_SOURCES = ("image", "path", "url", "base64", "image_url")
_KINDS = {"text": "text", "image": "image", "image_url": "image"}


def _read(row: Mapping[str, object], num_pictures: int) -> Conversation:
    messages = row["messages"]
    pictures: list[object] = []
    plain: list[object] = []
    parts: dict[int, tuple[str, ...]] = {}
    for number, message in enumerate(messages if isinstance(messages, list) else ()):
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, list):
            parts[number] = tuple(_part(part, number, pictures) for part in content)
            plain.append({**message, "content": "".join(parts[number])})
            continue
        plain.append(message)
        if isinstance(content, str):
            pictures += [None] * content.count(IMAGE_PLACEHOLDER)
    turns = read_turns({"messages": plain or messages}, "messages", "role", "content")
    return Conversation(
        tuple(replace(turn, parts=parts.get(number, ())) for number, turn in enumerate(turns)), pictures
    )


def _part(part: object, turn: int, pictures: list[object]) -> str:
    """The text of a typed part; the source of a picture is appended."""
    if not isinstance(part, dict):
        raise _unsupported(part, turn)
    sources = [key for key in _SOURCES if not is_absent(part.get(key))]
    text = part.get("text")
    kind = part.get("type")
    if kind is None and isinstance(text, str) != bool(sources):
        kind = "image" if sources else "text"
    kind = _KINDS.get(kind) if isinstance(kind, str) else None
    if kind == "text" and isinstance(text, str) and not sources:
        if IMAGE_PLACEHOLDER in text:
            raise FaultError(
                f"turn {turn}: {IMAGE_PLACEHOLDER} in the text of a typed part, where pictures are "
                "separate parts. Remove it."
            )
        return text
    if kind == "image" and is_absent(text) and len(sources) <= 1:
        index, number = part.get("index"), sum(picture is None for picture in pictures)
        if not sources and isinstance(index, int) and index not in (0, number):
            raise FaultError(
                f"turn {turn}: a part is picture {index} of 'images', where the next is picture {number}. Put 'images' "
                "in the order of the parts."
            )
        pictures.append(_source(part, sources))
        return IMAGE_PLACEHOLDER
    raise _unsupported(part, turn)


def _unsupported(part: object, turn: int) -> FaultError:
    return FaultError(
        f"turn {turn}: a part is {short(part)}; parts of type 'text' and 'image' are supported, each with a text or a "
        "picture of its own."
    )


def _source(part: Mapping[str, object], sources: list[str]) -> object:
    """The source of the picture in a typed part, or None."""
    if not sources:
        return None
    source = part[sources[0]]
    if isinstance(source, dict) and "url" in source:
        source = source["url"]
    return f"data:;base64,{source}" if sources[0] == "base64" else source


MESSAGES = Format(
    name="messages",
    keys=Keys(
        row=frozenset(),
        turns="messages",
        turn=frozenset({"role", "content"}),
        parts="content",
        part=frozenset({"type", "text", "index", *_SOURCES}),
    ),
    detect=lambda row: not is_absent(row.get("messages")),
    read=_read,
)
