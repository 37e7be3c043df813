"""ScienceQA: {"question", "choices", "answer": number from 0, "hint", "image", "subject", "grade", ...}.

Prompt and answer follow lmms-eval: options are listed by letter, and the answer is the letter alone.
"""

from collections.abc import Iterator, Mapping

from mars_jax.data.formats.base import (
    OPTION_PROMPT,
    Conversation,
    FaultError,
    Format,
    Keys,
    ask,
    text_columns,
    text_of,
)
from mars_jax.data.formats.choices import option_texts
from mars_jax.data.formats.options import LETTERS, asks, hint_of, lettered, without_letters
from mars_jax.runtime.text import short


def _detect(row: Mapping[str, object]) -> bool:
    return asks(row, "question", "choices", "answer") and isinstance(row["answer"], int | float)


def _read(row: Mapping[str, object], num_pictures: int) -> Conversation:
    choices, answer = without_letters(option_texts(row)), row["answer"]
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise FaultError(
            f"'answer' is {short(answer)}; the number of one of the {len(choices)} choices, from 0, is expected."
        )
    context = [f"Context: {hint}" for hint in hint_of(row)]
    lines = [*context, text_of(row, "question"), *lettered(choices), OPTION_PROMPT]
    return ask(lines, LETTERS[answer], num_pictures, LETTERS[: len(choices)])


def _tags(row: Mapping[str, object], num_pictures: int) -> Iterator[tuple[str, str]]:
    """The columns of ScienceQA's tables: a question with a picture and a hint has both contexts."""
    yield from text_columns(row, "subject")
    contexts = [("text", bool(hint_of(row))), ("image", num_pictures > 0)]
    yield from [("context", name) for name, present in contexts if present] or [("context", "none")]
    grade = str(row.get("grade", "")).removeprefix("grade")
    if grade.isdecimal() and len(grade) <= 2:
        yield "grade", "1-6" if int(grade) <= 6 else "7-12"


SCIENCEQA = Format(
    name="scienceqa",
    keys=Keys(row=frozenset({"question", "choices", "answer", "hint", "subject", "grade"})),
    detect=_detect,
    read=_read,
    tags=_tags,
    prompt="lmms-eval's of ScienceQA",
    answer_rules=("lmms", "llava", "letter"),
)
