"""Open questions: {"question", "answer": text, "image"}. The question is asked as it is."""

from collections.abc import Mapping

from mars_jax.data.formats.base import Conversation, FaultError, Format, Keys, ask, text_of
from mars_jax.data.formats.options import asks, is_unset
from mars_jax.data.values import is_absent
from mars_jax.runtime.text import short

_BESIDE = ("hint", "context")


def _detect(row: Mapping[str, object]) -> bool:
    return asks(row, "question") and ("answer" in row or not is_absent(row.get("answers")))


def _read(row: Mapping[str, object], num_pictures: int) -> Conversation:
    question = text_of(row, "question")
    if is_absent(row.get("answer")) and not is_absent(row.get("answers")):
        raise FaultError(
            f"'answers' is {short(row['answers'])}, and there is no 'answer': one answer is learnt. Write the one that "
            "the model should give as 'answer', such as the commonest."
        )
    for column in _BESIDE:
        if not is_unset(row.get(column)):
            raise FaultError(f"{column!r} is {short(row[column])}, and only 'question' is asked. Write it in there.")
    return ask([question], text_of(row, "answer"), num_pictures)


VQA = Format(name="vqa", keys=Keys(row=frozenset({"question", "answer", *_BESIDE})), detect=_detect, read=_read)
