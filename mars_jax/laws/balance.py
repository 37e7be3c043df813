"""The rank at which one module converges together with another, by their Law-C: on a grid, and in closed form."""

import math
from collections.abc import Sequence

import numpy as np

from mars_jax.laws.law_c import ConvergenceLaw

TOGETHER = 1.25
"""Ratio of convergence times up to which modules count as converging together, however well the times are known."""


def balanced_rank(
    pivot: ConvergenceLaw, other: ConvergenceLaw, rank: int, num_samples: float, grid: Sequence[int]
) -> int:
    """Rank of a grid at which `other` converges closest, in log steps, to `pivot` at `rank`.

    Where `other` is slower than the pivot at every rank, this is its fastest rank.

    Args:
        pivot: Law-C of the module whose rank is fixed.
        other: Law-C of the module whose rank is balanced.
        rank: rank of the pivot.
        num_samples: D.
        grid: ranks of the other module.

    Returns:
        A rank of the grid.
    """
    grid = sorted(grid)
    gaps = np.abs(other.log_steps(grid, num_samples) - pivot.log_steps(rank, num_samples))
    return int(grid[int(np.argmin(gaps))])


def balanced_rank_continuous(
    pivot: ConvergenceLaw, other: ConvergenceLaw, rank: float, num_samples: float
) -> float | None:
    """Balanced rank in closed form, off the grid (Cho et al., arXiv 2603.00720, Eq. 3, as reconstructed).

    r_o = [(k_p r_p**gamma_p D**delta_p + E_p - E_o) / (k_o D**delta_o)]**(1/gamma_o)

    Returns:
        The rank, or None where no rank balances: the bracket is not positive, gamma_o is 0 or the result overflows.
    """
    bracket = math.exp(min(float(pivot.log_steps(rank, num_samples)), 700.0)) - other.E
    if bracket <= 0 or other.gamma == 0:
        return None
    log_rank = (math.log(bracket) - math.log(other.k) - other.delta * math.log(num_samples)) / other.gamma
    return math.exp(log_rank) if abs(log_rank) < 700.0 else None
