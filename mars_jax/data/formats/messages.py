"""Chat messages: {"messages": [{"role", "content": text or parts}], "images": paths}.

In a text, `<image>` stands for the next of `images`. Parts are {"type": "text", "text"} and {"type": "image", ...}; an
image part holds its picture or stands for the next of `images`.
"""

import reprlib
from collections.abc import Mapping

from mars_jax.data.formats.base import IMAGE_PLACEHOLDER, Conversation, FaultError, Format, read_turns


def _read(row: Mapping[str, object], num_pictures: int) -> Conversation:
    messages = row["messages"]
    pictures: list[object] = []
    plain: list[object] = []
    for number, message in enumerate(messages if isinstance(messages, list) else ()):
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, list):
            plain.append({**message, "content": "".join(_part(part, number, pictures) for part in content)})
            continue
        plain.append(message)
        if isinstance(content, str):
            pictures += [None] * content.count(IMAGE_PLACEHOLDER)
    return Conversation(read_turns({**row, "messages": plain}, "messages", "role", "content"), pictures)


def _part(part: object, turn: int, pictures: list[object]) -> str:
    """The text of a typed part; the source of a picture is appended."""
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(part, dict) and kind == "text" and isinstance(part.get("text"), str):
        if IMAGE_PLACEHOLDER in part["text"]:
            raise FaultError(
                f"turn {turn}: {IMAGE_PLACEHOLDER} in the text of a typed part, where pictures are "
                "separate parts. Remove it."
            )
        return str(part["text"])
    if isinstance(part, dict) and kind in ("image", "image_url"):
        pictures.append(_source(part))
        return IMAGE_PLACEHOLDER
    raise FaultError(f"turn {turn}: a part is {reprlib.repr(part)}; parts of type 'text' and 'image' are supported.")


def _source(part: Mapping[str, object]) -> object:
    """The source of the picture in a typed part, or None."""
    for key in ("image", "path", "url", "base64", "image_url"):
        source = part.get(key)
        if isinstance(source, dict) and "url" in source:
            source = source["url"]
        if source is not None:
            return f"data:;base64,{source}" if key == "base64" else source
    return None


MESSAGES = Format(name="messages", detect=lambda row: "messages" in row, read=_read)
