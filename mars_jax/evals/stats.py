"""Statistics of evaluations: Wilson intervals, exact McNemar tests, macro means."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray


def wilson_interval(successes: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """The Wilson score interval of a proportion (Wilson 1927), by default at 95 %.

    Args:
        successes: number of successes.
        trials: number of trials, at least 1.
        z: normal quantile of the confidence level.
    """
    share, spread = successes / trials, z * z / trials
    centre = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / trials + spread / (4 * trials)) / (1 + spread)
    return centre - half, centre + half


class Accuracy(TypedDict):
    """A share of right answers, and its Wilson 95 % interval."""

    accuracy: float
    accuracy_ci: list[float]


def share(right: NDArray[np.bool_]) -> Accuracy:
    """The share of right answers in bool [n], n at least 1."""
    return {"accuracy": float(right.mean()), "accuracy_ci": list(wilson_interval(int(right.sum()), right.size))}


@dataclass(frozen=True)
class Paired:
    """A paired comparison of two models on the same questions.

    Attributes:
        only_first: number of questions that only the first answers right.
        only_second: number of questions that only the second answers right.
        p_value: p-value of McNemar's exact test (binomial, two-sided) of the hypothesis that both are equally good.
    """

    only_first: int
    only_second: int
    p_value: float


def mcnemar(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> Paired:
    """Compares two outcomes bool [n] on the same n questions (McNemar 1947, exact form)."""
    from scipy.stats import binomtest  # imported here because it takes half a second

    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    discordant = only_first + only_second
    p_value = float(binomtest(only_first, discordant).pvalue) if discordant else 1.0
    return Paired(only_first, only_second, p_value)


def macro_mean(correct: NDArray[np.bool_], classes: Sequence[str]) -> float:
    """The unweighted mean over classes of the share of right answers, from bool [n] and the n classes."""
    return float(np.mean([correct[[name == one for name in classes]].mean() for one in sorted(set(classes))]))
