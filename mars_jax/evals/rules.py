"""Rules that extract an answer from generated text.

Published numbers on ScienceQA and MMStar use different rules, so results name the rule. `RULES` has:

`lmms`     lmms-eval's for ScienceQA: the letter alone, or text that begins "X."
`llava`    LLaVA's script for ScienceQA: the letter, text that begins "X. ", or exactly one "The answer is X."
`mmstar`   MMStar's script: the first character, or the one after "(", "option " or "the answer is ", in either case; so
           "Blue" is B, as its authors count it
`letter`   the letter that the text gives as its answer in any usual form (`evals.letters`): the most lenient
`exact`    the whole text, ignoring case and white space: for answers that are not letters

Each rule sees texts in Unicode's form NFKC without invisible characters, so that composed and decomposed accents,
full-width letters and non-breaking spaces are alike. A letter beyond the question's options is no answer: the text is
unread by every rule, which is as wrong as a wrong letter, but is counted apart.

A data format names the rules for its answers (`Format.answer_rules`). To add a rule, register an `AnswerRule`.
"""

import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from mars_jax.data.formats.registry import FORMATS
from mars_jax.evals.letters import read_letter
from mars_jax.runtime.registry import Registry


def last_letter(option: str) -> str:
    """The letter that an option ends in: B of "B" and of "The answer is B."."""
    return option.rstrip(".")[-1]


@dataclass(frozen=True, slots=True)
class AnswerRule:
    """A rule that extracts answers from generated text; a text is right if its answer equals the target's.

    Attributes:
        name: unique among rules; results name it.
        read: returns the answer in a text, from the text (stripped, in NFKC) and the options of its question, each
            ending in its letter; None if the text holds no answer.
        target: returns the correct answer, from the text of a record's last turn (in NFKC).
    """

    name: str
    read: Callable[[str, Sequence[str]], str | None]
    target: Callable[[str], str] = last_letter


RULES: Registry[AnswerRule] = Registry("answer rule", {})


def rules_of(formats: Iterable[str]) -> Sequence[str]:
    """Names of the rules for answers to records of the given formats, the benchmark's rule first.

    Args:
        formats: the format of each record; if they differ, the only rule is `exact`.
    """
    names = set(formats)
    return FORMATS[names.pop()].answer_rules if len(names) == 1 else ("exact",)


def read_answer(rule: str, text: str, options: Sequence[str]) -> str | None:
    """The answer in a text by a rule of `RULES`, or None.

    Raises:
        ConfigError: there is no such rule.
    """
    return RULES[rule].read(_normal_form(text), options)


def is_right(rule: str, text: str, target: str, options: Sequence[str]) -> bool:
    """Whether the answer in a text is `target` by a rule of `RULES`; a text without an answer is wrong.

    Raises:
        ConfigError: there is no such rule.
    """
    return read_answer(rule, text, options) == RULES[rule].target(_normal_form(target))


def _normal_form(text: str) -> str:
    """NFKC without format characters such as zero-width spaces, which no reader sees."""
    normal = unicodedata.normalize("NFKC", text)
    return "".join(character for character in normal if unicodedata.category(character) != "Cf").strip()


def _folded(text: str) -> str:
    # Case folding may undo the normal form: U+1E9E becomes "ss", U+0390 decomposes.
    return " ".join(unicodedata.normalize("NFKC", text.casefold()).split())


def _of_options(letter: str, options: Sequence[str]) -> str | None:
    return letter if letter in map(last_letter, options) else None


def _lmms(text: str, options: Sequence[str]) -> str | None:
    return _of_options(text[0], options) if re.match(r"[A-Z](\.|$)", text) else None


def _llava(text: str, options: Sequence[str]) -> str | None:
    if re.match(r"[A-E](\. |$)", text):
        return _of_options(text[0], options)
    letters = re.findall(r"The answer is ([A-Z])\.", text)
    return _of_options(letters[0], options) if len(letters) == 1 else None


def _mmstar(text: str, options: Sequence[str]) -> str | None:
    match = re.match(r"(?:\(|option |the answer is )?([a-z])", text, re.IGNORECASE)
    # MMStar's script compares any first character, so "Apple" counts as A.
    return _of_options(match[1].upper(), options) if match else None


def _letter(text: str, options: Sequence[str]) -> str | None:
    return read_letter(text, [last_letter(option) for option in options])


RULES.register(AnswerRule("lmms", _lmms))
RULES.register(AnswerRule("llava", _llava))
RULES.register(AnswerRule("mmstar", _mmstar))
RULES.register(AnswerRule("letter", _letter))
RULES.register(AnswerRule("exact", lambda text, options: _folded(text), target=_folded))
