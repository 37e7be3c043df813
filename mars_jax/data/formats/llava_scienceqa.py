"""ScienceQA in the files of LLaVA: conversations whose last question lists its options.

The question has a line "Options: (A) ... (B) ...", and the answer is a letter of them, alone or as "The answer is X.".
Rows with a lecture before the answer are plain `llava`.
"""

import re
import string
from collections.abc import Mapping

from mars_jax.data.formats.base import Conversation, FaultError, Format, Turn, learned
from mars_jax.data.formats.llava import KEYS, read
from mars_jax.data.formats.turns import read_turns
from mars_jax.data.values import is_absent


def _detect(row: Mapping[str, object]) -> bool:
    conversation = row.get("conversations")
    if not isinstance(conversation, list) or not is_absent(row.get("messages")):
        return False
    try:
        last = read_turns({"conversations": conversation[-2:]}, "conversations", "from", "value")
    except FaultError:
        return False
    return bool(_options(last))


def _read(row: Mapping[str, object], num_pictures: int) -> Conversation:
    conversation = read(row, num_pictures)
    turns = conversation.turns
    answers = learned(turns)
    return conversation._replace(options=_options(turns[: answers[-1] + 1]) if answers else ())


def _options(turns: tuple[Turn, ...]) -> tuple[str, ...]:
    """The allowed answers of the last question; none if it lists no options or its answer is not one of them."""
    if [turn.role for turn in turns[-2:]] != ["user", "assistant"]:
        return ()
    listed = re.search(r"^Options: (\(A\) .*)$", turns[-2].text, re.MULTILINE)
    answer = re.fullmatch(r"(The answer is )?([A-Z])(\.?)", turns[-1].text.strip())
    if listed is None or answer is None:
        return ()
    if "(AA) " in listed[1]:
        raise FaultError("the question lists more than 26 options, (A) to (Z). Ask it with fewer.")
    letters = ""
    for letter in re.findall(r"\(([A-Z])\) ", listed[1]):
        # Choices may contain such letters too; the letters of the list come in alphabetical order.
        letters += letter if letter == string.ascii_uppercase[len(letters) :][:1] else ""
    if answer[2] not in letters:
        return ()
    return tuple(f"{answer[1] or ''}{letter}{answer[3]}" for letter in letters)


LLAVA_SCIENCEQA = Format(
    name="llava_scienceqa",
    keys=KEYS,
    detect=_detect,
    read=_read,
    answer_rules=("llava", "lmms", "letter"),
)
