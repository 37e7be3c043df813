"""Statistics of evaluations: Wilson intervals, exact McNemar tests, macro means."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


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
