"""Rules that read an answer out of generated text, and the statistics of right and wrong. Nothing is generated here.

Published numbers on ScienceQA and MMStar come from different rules, so each has a name and results say which was used:

`lmms`     lmms-eval's for ScienceQA: the letter alone, or text that begins "X."
`llava`    LLaVA's script for ScienceQA: the letter, text that begins "X. ", or exactly one "The answer is X."
`mmstar`   MMStar's own: the first character, or the one after "(", "option " or "the answer is ", in either case
`letter`   the one option that stands alone in the text, as "B", "(B)", "B." or "answer is B": the most forgiving
`exact`    the whole text, but for case and white space: where an answer is no letter
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from mars_jax.data.formats.base import Format

Reader = Callable[[str, Sequence[str]], str | None]
"""Reads the answer from a text and the options, each of which ends in its letter; None where it finds none."""


def _lmms(text: str, options: Sequence[str]) -> str | None:
    return text[0] if re.match(r"[A-Z](\.|$)", text) else None


def _llava(text: str, options: Sequence[str]) -> str | None:
    if re.match(r"[A-E](\. |$)", text):
        return text[0]
    found = re.findall(r"The answer is ([A-Z])\.", text)
    return found[0] if len(found) == 1 else None


def _mmstar(text: str, options: Sequence[str]) -> str | None:
    found = re.match(r"(?:\(|option |the answer is )?([a-z])", text, re.IGNORECASE)
    # Its own script compares any first character, so that of "Apple" is an A.
    return found[1].upper() if found else None


def _letter(text: str, options: Sequence[str]) -> str | None:
    letter = f"([{''.join(map(_last_letter, options))}])"
    # A letter within a sentence is a word ("A cat"), unless something sets it apart.
    alone = re.findall(rf"\({letter}\)|\b{letter}(?=[.):,]|\s*$)|\b(?:is|answer|option):?\s+{letter}\b", text)
    found = {"".join(groups) for groups in alone}
    return found.pop() if len(found) == 1 else None


def _last_letter(option: str) -> str:
    """Of "B" as of "The answer is B."."""
    return option.rstrip(".")[-1]


def _exact(text: str, options: Sequence[str]) -> str | None:
    return " ".join(text.casefold().split())


READERS: Mapping[str, Reader] = {
    "lmms": _lmms,
    "llava": _llava,
    "mmstar": _mmstar,
    "letter": _letter,
    "exact": _exact,
}

_RULES: Mapping[Format, Sequence[str]] = {
    "scienceqa": ("lmms", "llava", "letter"),
    "llava_scienceqa": ("llava", "lmms", "letter"),
    "mmstar": ("mmstar", "letter"),
}


def rules_of(formats: Iterable[Format]) -> Sequence[str]:
    """The rules for answers generated to records of some formats, the one that a benchmark is known by first."""
    kinds = set(formats)
    return _RULES.get(kinds.pop(), ("exact",)) if len(kinds) == 1 else ("exact",)


def read_answer(rule: str, text: str, options: Sequence[str]) -> str | None:
    """The answer that a text gives by a rule of `READERS`, None where it gives none."""
    return READERS[rule](text.strip(), options)


def is_right(rule: str, text: str, target: str, options: Sequence[str]) -> bool:
    """Whether a text gives the answer `target` by a rule; a text that can't be read is wrong."""
    wanted = _exact(target, options) if rule == "exact" else _last_letter(target)
    return read_answer(rule, text, options) == wanted
