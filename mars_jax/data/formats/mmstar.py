"""MMStar: {"question": text with its options, "answer": letter, "image", "category", "l2_category", ...}.

The prompt follows lmms-eval. Tables of results have a row for each category and class (`l2_category`).
"""

from collections.abc import Iterator, Mapping

from mars_jax.data.formats.base import OPTION_PROMPT, Conversation, Format, Turn, ask, text_columns


def _detect(row: Mapping[str, object]) -> bool:
    return {"question", "answer", "image"} <= row.keys() and not {"choices", "conversations"} & row.keys()


def _read(row: Mapping[str, object], num_pictures: int) -> Conversation:
    return ask([str(row["question"]), OPTION_PROMPT], str(row["answer"]), num_pictures)


def _options(row: Mapping[str, object], turns: tuple[Turn, ...]) -> tuple[str, ...]:
    return tuple("ABCD")


def _tags(row: Mapping[str, object], num_pictures: int) -> Iterator[tuple[str, str]]:
    return text_columns(row, "category", "l2_category")


MMSTAR = Format(
    name="mmstar",
    detect=_detect,
    read=_read,
    options=_options,
    tags=_tags,
    prompt="lmms-eval's of MMStar",
    answer_rules=("mmstar", "letter"),
)
