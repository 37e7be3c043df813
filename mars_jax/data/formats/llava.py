"""LLaVA's conversations, and ShareGPT's: {"id", "image": path or paths, "conversations": [{"from", "value"}]}.

Speakers are "human" and "gpt", or "user" and "assistant". ShareGPT's files have `images`, and may have a `system` text.
Rows that no other format detects are read as this one, so that their faults name the expected form.
"""

from collections.abc import Mapping

from mars_jax.data.formats.base import Conversation, Format, read_turns


def read(row: Mapping[str, object], num_pictures: int) -> Conversation:
    """The turns of `conversations`.

    Raises:
        FaultError: `conversations` is no list of turns.
    """
    return Conversation(read_turns(row, "conversations", "from", "value"))


LLAVA = Format(name="llava", detect=lambda row: True, read=read)
