"""Open questions: {"question", "answer": text, "image"}. The question is asked as it is."""

from collections.abc import Mapping

from mars_jax.data.formats.base import Conversation, FaultError, Format, Keys, ask, text_of
from mars_jax.data.formats.options import asks
from mars_jax.data.values import is_absent
from mars_jax.runtime.text import short


def _detect(row: Mapping[str, object]) -> bool:
    return asks(row, "question") and ("answer" in row or not is_absent(row.get("answers")))


def _read(row: Mapping[str, object], num_pictures: int) -> Conversation:
    question = text_of(row, "question")
    if is_absent(row.get("answer")) and not is_absent(row.get("answers")):
        raise FaultError(
            f"'answers' is {short(row['answers'])}, and there is no 'answer': one answer is learned. Write the one "
            "that the model should give as 'answer', such as the commonest."
        )
    return ask([question], text_of(row, "answer"), num_pictures)


VQA = Format(name="vqa", keys=Keys(row=frozenset({"question", "answer"})), detect=_detect, read=_read)
