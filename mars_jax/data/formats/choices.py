"""Questions with a list of options: {"question", "choices" or "options": texts, "answer": letter or text, "image"}.

ScienceQA, whose answer is a number, is a format of its own. The prompt is that of `mmbench`.
"""

from collections.abc import Mapping

from mars_jax.data.formats.base import Conversation, FaultError, Format, Keys
from mars_jax.data.formats.keys import OPTION_LISTS
from mars_jax.data.formats.options import LETTERS, ask_options, asks
from mars_jax.data.values import is_absent
from mars_jax.runtime.text import short


def _detect(row: Mapping[str, object]) -> bool:
    return asks(row, "question") and any(not is_absent(row.get(column)) for column in OPTION_LISTS)


def _read(row: Mapping[str, object], num_pictures: int) -> Conversation:
    return ask_options(row, option_texts(row), num_pictures)


def option_texts(row: Mapping[str, object]) -> list[str]:
    """The options of a row.

    Raises:
        FaultError: they are no list of 2 to 26 texts.
    """
    given = [column for column in OPTION_LISTS if not is_absent(row.get(column))] or ["choices"]
    if len(given) > 1:
        raise FaultError("the row has 'choices' and 'options'. Take one of them out.")
    options = row.get(given[0])
    if not (isinstance(options, list) and 2 <= len(options) <= len(LETTERS)):
        raise FaultError(f"{given[0]!r} is {short(options)}; a list of 2 to {len(LETTERS)} texts is expected.")
    if not all(isinstance(option, str) and option.strip() for option in options):
        raise FaultError(f"{given[0]!r} is {short(options)}; every option must be a text. Write them as texts.")
    return [str(option) for option in options]


CHOICES = Format(
    name="choices",
    keys=Keys(row=frozenset({"question", "hint", "answer", *OPTION_LISTS})),
    detect=_detect,
    read=_read,
    prompt="LLaVA's of MMBench",
    answer_rules=("lmms", "letter"),
)
