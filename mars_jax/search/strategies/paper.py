"""Strategy `paper`: MARS as published."""

from collections.abc import Mapping, Sequence

import numpy as np

from mars_jax.laws.balance import balanced_rank
from mars_jax.laws.fit import Laws
from mars_jax.search.selection import Ranks


def on_balance_curve(
    laws: Laws,
    grids: Mapping[str, Sequence[int]],
    searched: Sequence[str],
    pivot: str,
    num_samples: float,
    vectors: Sequence[Ranks],
) -> np.ndarray:
    """[Q] bool: the vectors in which every other module has the rank that balances the pivot's."""
    others = [module for module in searched if module != pivot]
    curve = {
        rank: {
            m: balanced_rank(laws.convergence[pivot], laws.convergence[m], rank, num_samples, grids[m]) for m in others
        }
        for rank in grids[pivot]
    }
    return np.array([all(vector[m] == curve[vector[pivot]][m] for m in others) for vector in vectors])
