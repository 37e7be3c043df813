"""Questions with options: the letters that a question lists, answers by letter or text, and how options are asked."""

import re
import string
from collections.abc import Mapping, Sequence

from mars_jax.data.formats.base import OPTION_PROMPT, Conversation, FaultError, ask, text_of
from mars_jax.data.formats.keys import CONVERSATIONS
from mars_jax.data.values import is_absent, kind_of
from mars_jax.runtime.text import short

LETTERS = string.ascii_uppercase

# A letter at the start of a line or after white space or a bracket, set off from its option: "A: ", "(A) ", "A. ".
_MARKERS = {letter: re.compile(rf"(?:^|[\s(,;]){letter}[:.)]+(?=\s)") for letter in LETTERS}


def asks(row: Mapping[str, object], *columns: str) -> bool:
    """Whether a row has these columns, whatever they hold, and no conversation."""
    return set(columns) <= row.keys() and all(is_absent(row.get(key)) for key in CONVERSATIONS)


def listed_letters(question: str) -> str:
    """The letters A, B, ... of the options that a question lists; "" if it lists fewer than two."""
    position, letters = 0, ""
    for letter in LETTERS:
        found = _MARKERS[letter].search(question, position)
        if found is None:
            break
        position, letters = found.end(), letters + letter
    return letters if len(letters) > 1 else ""


def is_letter(answer: object, letters: str = LETTERS) -> bool:
    """Whether an answer is one of some letters alone."""
    return isinstance(answer, str) and len(answer.strip()) == 1 and answer.strip() in letters


def answer_letter(answer: object, options: Sequence[str]) -> str:
    """The letter of the right option, from an answer that is a letter or the text of an option.

    Raises:
        FaultError: it is neither, or could be both.
    """
    allowed = f"a letter A to {LETTERS[len(options) - 1]} or the text of one of the options"
    if not isinstance(answer, str):
        raise FaultError(f"'answer' is {short(answer)} ({kind_of(answer)}); {allowed} is expected. Write the letter.")
    text = answer.strip()
    as_letter = re.fullmatch(rf"\(?([{LETTERS[: len(options)]}])[).:]{{0,2}}", text)
    letters = {as_letter[1]} if as_letter else set()
    for letter, option in zip(LETTERS, options, strict=False):
        if text.removeprefix(next((start for start in starts(letter) if text.startswith(start)), "")) == option.strip():
            letters.add(letter)
    if len(letters) != 1:
        problem = "more than one of" if letters else "none of"
        raise FaultError(f"'answer' is {short(answer)}, {problem} the {len(options)} options; {allowed} is expected.")
    return letters.pop()


def starts(letter: str) -> tuple[str, ...]:
    """How an option begins that is written with its letter."""
    return f"{letter}. ", f"{letter}: ", f"{letter}) ", f"({letter}) "


def ask_options(row: Mapping[str, object], options: Sequence[str], num_pictures: int) -> Conversation:
    """The question of a row with its hint before it and its options after it, as LLaVA asks MMBench."""
    hint = [] if is_unset(row.get("hint")) else [text_of(row, "hint").strip()]
    listed = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]
    answer = answer_letter(row.get("answer"), options)
    return ask([*hint, text_of(row, "question"), *listed, OPTION_PROMPT], answer, num_pictures)


def is_unset(value: object) -> bool:
    """Whether a cell of a table is empty; some were written by pandas, as "nan"."""
    return is_absent(value) or value == "nan"
