"""MMStar: {"question": text with its options, "answer": letter A to D, "image", "category", "l2_category", ...}.

The prompt follows lmms-eval. Tables of results have a row for each category and class (`l2_category`). Rows whose
question lists no options are MMStar's only with an `l2_category`; else they are `vqa`.
"""

from collections.abc import Iterator, Mapping

from mars_jax.data.formats.base import OPTION_PROMPT, Conversation, Format, Keys, ask, text_columns, text_of
from mars_jax.data.formats.options import asks, is_letter, listed_letters
from mars_jax.data.values import is_absent

_LETTERS = "ABCD"


def _detect(row: Mapping[str, object]) -> bool:
    question = row.get("question")
    if not (asks(row, "question", "answer", "image") and isinstance(question, str)):
        return False
    listed = listed_letters(question)
    is_benchmark = bool(listed) or not is_absent(row.get("l2_category"))
    return is_benchmark and listed in _LETTERS and is_letter(row["answer"], listed or _LETTERS)


def _read(row: Mapping[str, object], num_pictures: int) -> Conversation:
    question, answer = text_of(row, "question"), text_of(row, "answer").strip()
    return ask([question, OPTION_PROMPT], answer, num_pictures, listed_letters(question) or _LETTERS)


def _tags(row: Mapping[str, object], num_pictures: int) -> Iterator[tuple[str, str]]:
    return text_columns(row, "category", "l2_category")


MMSTAR = Format(
    name="mmstar",
    keys=Keys(row=frozenset({"question", "answer", "l2_category"})),
    detect=_detect,
    read=_read,
    tags=_tags,
    prompt="lmms-eval's of MMStar",
    answer_rules=("mmstar", "letter"),
)
