"""Questions with options: the letters that a question lists, answers by letter or text, and how options are asked."""

import re
import string
from collections.abc import Mapping, Sequence

from mars_jax.data.formats.base import OPTION_PROMPT, Conversation, FaultError, ask, text_of
from mars_jax.data.formats.keys import CONVERSATIONS
from mars_jax.data.values import is_absent, stands_for_nothing
from mars_jax.runtime.text import json_type, short

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
        raise FaultError(f"'answer' is {short(answer)} ({json_type(answer)}); {allowed} is expected. Write the letter.")
    text = answer.strip()
    as_letter = re.fullmatch(rf"\(?([{LETTERS[: len(options)]}])[).:]{{0,2}}", text)
    letters = {as_letter[1]} if as_letter else set()
    for letter, option in zip(LETTERS, options, strict=False):
        start = next((start for start in _starts(letter) if text.startswith(start)), "")
        if text.removeprefix(start) == option.strip():
            letters.add(letter)
    if len(letters) != 1:
        problem = "more than one of" if letters else "none of"
        raise FaultError(f"'answer' is {short(answer)}, {problem} the {len(options)} options; {allowed} is expected.")
    return letters.pop()


def _starts(letter: str) -> tuple[str, ...]:
    """How an option begins that is written with its letter."""
    return f"{letter}. ", f"{letter}: ", f"{letter}) ", f"({letter}) "


def without_letters(options: Sequence[str]) -> list[str]:
    """Options such as "A. red" or "(A) red" without their letters, where all have them.

    Raises:
        FaultError: an option is blank.
    """
    bare = list(options)
    for style in zip(*(_starts(letter) for letter in LETTERS[: len(options)]), strict=True):
        if all(option.startswith(start) for option, start in zip(options, style, strict=True)):
            bare = [option.removeprefix(start) for option, start in zip(options, style, strict=True)]
    for letter, option in zip(LETTERS, bare, strict=False):
        if not option.strip():
            raise FaultError(f"option {letter} is empty. Write its text, or leave the row out.")
    return bare


def lettered(options: Sequence[str]) -> list[str]:
    """Options with their letters before them, as they are asked."""
    return [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]


def hint_of(row: Mapping[str, object]) -> list[str]:
    """The text of a row's `hint`, if it has one."""
    return [] if stands_for_nothing(row.get("hint")) else [text_of(row, "hint").strip()]


def ask_options(row: Mapping[str, object], options: Sequence[str], num_pictures: int) -> Conversation:
    """The question of a row with its hint before it and its options after it, as LLaVA asks MMBench.

    Args:
        row: with the question, the hint and the answer.
        options: 2 to 26 texts, with or without their letters.
        num_pictures: pictures of the row.

    Raises:
        FaultError: the question, an option or the answer can't be read.
    """
    texts = without_letters(options)
    answer = answer_letter(row.get("answer"), texts)
    lines = [*hint_of(row), text_of(row, "question"), *lettered(texts), OPTION_PROMPT]
    return ask(lines, answer, num_pictures, LETTERS[: len(texts)])
