"""Rules that read an answer out of generated text, and the statistics of right and wrong. Nothing is generated here.

Published numbers on ScienceQA and MMStar come from different rules, so each has a name and results say which was used:

`lmms`     lmms-eval's for ScienceQA: the letter alone, or text that begins "X."
`llava`    LLaVA's script for ScienceQA: the letter, text that begins "X. ", or exactly one "The answer is X."
`mmstar`   MMStar's own: the first character, or the one after "(", "option " or "the answer is ", in either case
`letter`   the one option that stands alone in the text, as "B", "(B)", "B." or "answer is B": the most forgiving
`exact`    the whole text, but for case and white space: where an answer is no letter
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mars_jax.data.formats import Format

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


def wilson_interval(successes: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """The Wilson score interval of a proportion (Wilson 1927), by default at 95 %."""
    share, spread = successes / trials, z * z / trials
    centre = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / trials + spread / (4 * trials)) / (1 + spread)
    return centre - half, centre + half


def share(right: NDArray[np.bool_]) -> dict[str, Any]:
    """The share of bool [n] that is right as `accuracy`, and its Wilson 95 % interval as `accuracy_ci`."""
    return {"accuracy": float(right.mean()), "accuracy_ci": list(wilson_interval(int(right.sum()), right.size))}


@dataclass(frozen=True)
class Paired:
    """Two ways to answer the same questions.

    Attributes:
        only_first: questions that the first alone has right.
        only_second: that the second alone has right.
        p_value: of the hypothesis that neither is better: McNemar's test, exact (binomial, two-sided).
    """

    only_first: int
    only_second: int
    p_value: float


def mcnemar(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> Paired:
    """Compares two outcomes bool [n] on the same n questions (McNemar 1947, exact form)."""
    from scipy.stats import binomtest  # half a second, which every command would wait for

    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    discordant = only_first + only_second
    p_value = float(binomtest(only_first, discordant).pvalue) if discordant else 1.0
    return Paired(only_first, only_second, p_value)


def macro_mean(correct: NDArray[np.bool_], classes: Sequence[str]) -> float:
    """The mean over classes of the share right in each: bool [n] and the class of each."""
    return float(np.mean([correct[[name == one for name in classes]].mean() for one in sorted(set(classes))]))
