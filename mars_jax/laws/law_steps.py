"""Law-P in step sizes: a loss from ranks and learning rates, with an optimum inside both.

    log p = c + sum_m (A_m s_m**-1/2 + C_m s_m),    s_m = r_m eta_m / (their geometric mean over the runs)

With alpha = 2r a rank sets above all how far a module moves in a step, as its learning rate does: the update of r
columns that each move by eta. So the law reads their product, the step size s_m of module m. Too small a step size
leaves the fall unfinished (A), too large a one spoils the module (C); both are >= 0, so a module has one optimum. The
form and its exponents were chosen by how they order runs that were not fitted (docs/evidence.md, law_forms).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from mars_jax.errors import NoValidResultError

FALL, RISE = 0.5, 1.0
"""Exponents of the falling and of the rising term."""

LEAST_RUNS = 3
"""Runs below which no law is fitted."""

_NOTHING = 1e-9  # a weight of a term, in log loss, that is a rounding error


@dataclass(frozen=True)
class StepLaw:
    """A fitted Law-P in step sizes.

    Attributes:
        c: log loss that no step size changes.
        A: module -> weight of the falling term at s = 1, >= 0.
        C: module -> weight of the rising term at s = 1, >= 0.
        unit: module -> rank times learning rate at which s = 1.
    """

    c: float
    A: Mapping[str, float]
    C: Mapping[str, float]
    unit: Mapping[str, float]

    @property
    def modules(self) -> tuple[str, ...]:
        """Modules whose step sizes the law reads."""
        return tuple(self.unit)

    def log_loss(self, ranks: Mapping[str, ArrayLike], rates: Mapping[str, ArrayLike]) -> np.ndarray:
        """Expected log losses [Q] of ranks and learning rates, module -> [Q], up to what all runs have in common."""
        s = {m: np.asarray(ranks[m], np.float64) * np.asarray(rates[m], np.float64) / self.unit[m] for m in self.unit}
        return self.c + sum((self.A[m] * s[m] ** -FALL + self.C[m] * s[m] ** RISE for m in s), np.zeros(()))

    def optimum(self, module: str) -> float | None:
        """Rank times learning rate at which the loss is lowest; None where the runs don't enclose one."""
        A, C = self.A[module], self.C[module]
        return self.unit[module] * (FALL * A / (RISE * C)) ** (1 / (FALL + RISE)) if A > 0 and C > 0 else None


def fit_step_law(ranks: Mapping[str, ArrayLike], rates: Mapping[str, ArrayLike], log_losses: ArrayLike) -> StepLaw:
    """Least squares over c, A >= 0 and C >= 0.

    Args:
        ranks: module -> [N] ranks, >= 1.
        rates: module -> [N] learning rates, > 0.
        log_losses: [N] logs of losses at the same step, or relative to one run's at the same step.

    Raises:
        NoValidResultError: fewer than `LEAST_RUNS` runs.
    """
    from scipy.optimize import lsq_linear  # takes a while to import, and is used only here

    log_loss = np.asarray(log_losses, np.float64)
    if len(log_loss) < LEAST_RUNS:
        raise NoValidResultError(
            f"Law-P in step sizes: {len(log_loss)} runs; needed: {LEAST_RUNS} or more. Begin more runs."
        )
    modules = list(ranks)
    steps = {m: np.asarray(ranks[m], np.float64) * np.asarray(rates[m], np.float64) for m in modules}
    unit = {m: math.exp(float(np.mean(np.log(steps[m])))) for m in modules}
    s = np.stack([steps[m] / unit[m] for m in modules], axis=1)
    columns = np.concatenate([np.ones((len(s), 1)), s**-FALL, s**RISE], axis=1)
    lowest = np.array([-np.inf, *[0.0] * (2 * len(modules))])
    found = lsq_linear(columns, log_loss, (lowest, np.inf), method="bvls").x
    c, *weights = map(float, np.where(np.abs(found) > _NOTHING, found, 0.0))
    A, C = (dict(zip(modules, part, strict=True)) for part in (weights[: len(modules)], weights[len(modules) :]))
    return StepLaw(c, A, C, unit)
