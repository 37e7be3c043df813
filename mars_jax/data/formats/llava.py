"""LLaVA's conversations, and ShareGPT's: {"id", "image": path or paths, "conversations": [{"from", "value"}]}.

Speakers are "human" and "gpt", or "user" and "assistant". ShareGPT's files have `images`, and may have a `system` text.
Rows that no other format detects are read as this one, so that their faults name the expected form.
"""

from collections.abc import Mapping

from mars_jax.data.formats.base import Conversation, FaultError, Format, Keys
from mars_jax.data.formats.turns import read_turns
from mars_jax.data.values import is_absent
from mars_jax.runtime.text import short

KEYS = Keys(row=frozenset(), turns="conversations", turn=frozenset({"from", "value"}))

_MESSAGES = 'Write {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}.'
# Keys of rows that others read, which name what a row is instead.
_OTHERS = {
    ("conversation",): "The column is called 'conversations' here. Rename it.",
    ("query", "response"): f"A row of 'query' and 'response' (ms-swift) is not read. {_MESSAGES}",
    ("instruction", "output"): f"A row of 'instruction' and 'output' (Alpaca) is not read. {_MESSAGES}",
    ("prompt", "completion"): f"A row of 'prompt' and 'completion' (TRL) is not read. {_MESSAGES}",
    ("prompt", "response"): f"A row of 'prompt' and 'response' is not read. {_MESSAGES}",
    ("texts",): f"A row of 'texts' (the_cauldron) is not read. {_MESSAGES}",
    ("question",): "It has a 'question' but no 'answer'. Give the answer, as text.",
    ("text",): f"A text alone has no question. {_MESSAGES}",
    ("caption",): f"A caption alone has no question. {_MESSAGES}",
}


def read(row: Mapping[str, object], num_pictures: int) -> Conversation:
    """The turns of `conversations`.

    Raises:
        FaultError: `conversations` is no list of turns.
    """
    if "conversations" not in row:
        raise FaultError(_no_conversation(row))
    return Conversation(read_turns(row, "conversations", "from", "value"))


def _no_conversation(row: Mapping[str, object]) -> str:
    keys = [key for key, value in row.items() if not is_absent(value)]
    hint = next((hint for names, hint in _OTHERS.items() if set(names) <= set(keys)), "")
    return (
        "the row has no conversation: 'conversations', 'messages', or 'question' and 'answer' are expected; seen "
        f"{short(keys)}. {hint}".rstrip()
    )


LLAVA = Format(name="llava", keys=KEYS, detect=lambda row: True, read=read)
