"""Option columns, as in MMBench and VLMEvalKit's tables: {"question", "hint", "A", "B", ..., "answer": letter}.

The prompt follows LLaVA's script for MMBench: the hint, the question, the options by letter.
"""

from collections.abc import Mapping

from mars_jax.data.formats.base import Conversation, FaultError, Format, Keys, text_of
from mars_jax.data.formats.options import LETTERS, ask_options, asks
from mars_jax.data.values import is_unset


def _detect(row: Mapping[str, object]) -> bool:
    return asks(row, "question") and not all(is_unset(row.get(letter)) for letter in "ABCD")


def _read(row: Mapping[str, object], num_pictures: int) -> Conversation:
    return ask_options(row, _texts(row), num_pictures)


def _texts(row: Mapping[str, object]) -> list[str]:
    letters = "".join(letter for letter in LETTERS if not is_unset(row.get(letter)))
    if not LETTERS.startswith(letters) or len(letters) < 2:
        raise FaultError(
            f"the row has the options {', '.join(letters)}; two or more from A on without a gap are expected."
        )
    if not is_unset(row.get("AA")):
        raise FaultError("the row has more than 26 options, A to Z. Ask it with fewer.")
    return [text_of(row, letter) for letter in letters]


MMBENCH = Format(
    name="mmbench",
    keys=Keys(row=frozenset({"question", "hint", "answer", *LETTERS})),
    detect=_detect,
    read=_read,
    prompt="LLaVA's of MMBench",
    answer_rules=("lmms", "letter"),
)
