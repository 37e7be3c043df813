"""Which rank makes one module converge when another does, by their laws: on a grid, and in closed form.

Pure functions of two laws; which pairs are picked is decided in `selection`.
"""

import math
from collections.abc import Sequence

import numpy as np

from mars_jax.laws.law_c import ConvergenceLaw


def balanced_rank(
    pivot: ConvergenceLaw, other: ConvergenceLaw, rank: int, num_samples: float, grid: Sequence[int]
) -> int:
    """The rank of `grid` at which `other` converges most nearly when `pivot` does at `rank`; real for any law.

    Where `other` is too slow at every rank (its offset exceeds the pivot's time) this is its fastest rank.
    """
    grid = sorted(grid)
    gaps = np.abs(other.log_steps(grid, num_samples) - pivot.log_steps(rank, num_samples))
    return int(grid[int(np.argmin(gaps))])


def balanced_rank_continuous(
    pivot: ConvergenceLaw, other: ConvergenceLaw, rank: float, num_samples: float
) -> float | None:
    """The closed form of the balanced rank (Cho et al., arXiv 2603.00720, Eq. 3, as reconstructed), off the grid.

    r_o = [(k_p r_p**gamma_p D**delta_p + E_p - E_o) / (k_o D**delta_o)]**(1/gamma_o)

    Returns:
      The rank, or None where the bracket is not positive, gamma_o is 0 or the result overflows: no rank balances then.
    """
    bracket = math.exp(min(float(pivot.log_steps(rank, num_samples)), 700.0)) - other.E
    if bracket <= 0 or other.gamma == 0:
        return None
    log_rank = (math.log(bracket) - math.log(other.k) - other.delta * math.log(num_samples)) / other.gamma
    return math.exp(log_rank) if abs(log_rank) < 700.0 else None
