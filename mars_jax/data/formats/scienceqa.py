"""ScienceQA: {"question", "choices", "answer": number from 0, "hint", "image", "subject", "grade", ...}.

Prompt and answer follow lmms-eval: options are listed by letter, and the answer is the letter alone.
"""

import reprlib
import string
from collections.abc import Iterator, Mapping

from mars_jax.data.formats.base import OPTION_PROMPT, Conversation, FaultError, Format, Turn, ask, text_columns

_LETTERS = string.ascii_uppercase


def _detect(row: Mapping[str, object]) -> bool:
    return {"question", "choices", "answer"} <= row.keys()


def _read(row: Mapping[str, object], num_pictures: int) -> Conversation:
    choices, answer = _choices(row), row["answer"]
    if not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise FaultError(
            f"'answer' is {answer!r}; the number of one of the {len(choices)} choices, from 0, is expected."
        )
    hint = _hint(row)
    options = [f"{letter}. {choice}" for letter, choice in zip(_LETTERS, choices, strict=False)]
    lines = [*([f"Context: {hint}"] if hint else []), str(row["question"]), *options, OPTION_PROMPT]
    return ask(lines, _LETTERS[answer], num_pictures)


def _choices(row: Mapping[str, object]) -> list[object]:
    choices = row["choices"]
    if not (isinstance(choices, list) and 2 <= len(choices) <= len(_LETTERS)):
        raise FaultError(f"'choices' is {reprlib.repr(choices)}; a list of 2 to {len(_LETTERS)} texts is expected.")
    return choices


def _hint(row: Mapping[str, object]) -> str:
    return str(row.get("hint") or "").strip()


def _options(row: Mapping[str, object], turns: tuple[Turn, ...]) -> tuple[str, ...]:
    return tuple(_LETTERS[: len(_choices(row))])


def _tags(row: Mapping[str, object], num_pictures: int) -> Iterator[tuple[str, str]]:
    """The columns of ScienceQA's tables: a question with a picture and a hint has both contexts."""
    yield from text_columns(row, "subject")
    contexts = [("text", bool(_hint(row))), ("image", num_pictures > 0)]
    yield from [("context", name) for name, present in contexts if present] or [("context", "none")]
    grade = str(row.get("grade", "")).removeprefix("grade")
    if grade.isdecimal():
        yield "grade", "1-6" if int(grade) <= 6 else "7-12"


SCIENCEQA = Format(
    name="scienceqa",
    detect=_detect,
    read=_read,
    options=_options,
    tags=_tags,
    prompt="lmms-eval's of ScienceQA",
    answer_rules=("lmms", "llava", "letter"),
)
