"""Strategy `paper`: MARS as published (Cho et al., arXiv 2603.00720).

For each rank of the pivot module keep the one vector that balances it best by Law-C, and take the smallest loss of the
multiplicative Law-P. The pivot is the LLM, or the last searched module where that isn't searched.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from mars_jax.errors import NoValidResultError
from mars_jax.laws.balance import balanced_rank
from mars_jax.laws.fit import Laws, determined
from mars_jax.search.candidates import ProbedLosses, Pruning, RankGrid, least_unbalanced, pick_among, rank_grid
from mars_jax.search.selection import Selection
from mars_jax.search.strategies.law_pick import LawPick

_PIVOT = "llm"


def pick_as_published(
    laws: Laws,
    grids: Mapping[str, Sequence[int]],
    num_samples: int,
    parameters_per_rank: Mapping[str, int],
    probed: ProbedLosses = (),
) -> Selection:
    """Picks ranks from the grid at the target number of samples.

    Args:
        laws: fitted laws.
        grids: module -> ranks to choose among; a module with one rank is carried through, not searched.
        num_samples: D of the run that the ranks are for.
        parameters_per_rank: module -> trainable parameters of one rank.
        probed: losses of probes, for the record.

    Returns:
        The selection; `fallback` is set, and the least unbalanced vector picked, when none is balanced.

    Raises:
        ConfigError: the grid, the laws and the parameter counts do not belong together.
        NoValidResultError: a searched module has no Law-C.
    """
    grid = rank_grid(laws, grids, num_samples, parameters_per_rank)
    if grid.imbalance is None or grid.tau is None:
        reasons = " ".join(laws.untimed.values()) or "The lanes have no convergence times."
        raise NoValidResultError(f"the paper's method needs Law-C of every searched module. {reasons}")
    kept, fallback = _on_balance_curve(laws, grid), None
    if not kept.any():
        kept, fallback = least_unbalanced(grid, grid.imbalance, grid.tau)
    words = "another rank balances better", "nearest balance for this rank of the pivot"
    law = determined(laws.multiplicative)
    return pick_among(
        grid,
        Pruning(
            method="paper",
            kept=kept,
            reasons=[f"{grid.apart(i)}; {words[bool(kept[i])]}" for i in range(len(kept))],
            score=law.loss(grid.vectors, num_samples),
            draws=law.loss_draws(grid.vectors, num_samples),
            tie=0.0,
            fallback=fallback,
            allowed="nearest balance",
            lowest="the smallest",
        ),
        probed,
    )


def _on_balance_curve(laws: Laws, grid: RankGrid) -> np.ndarray:
    """[Q] bool: the vectors in which every other module has the rank that balances the pivot's."""
    pivot = _PIVOT if _PIVOT in grid.searched else grid.searched[-1]
    others = [module for module in grid.searched if module != pivot]
    law = laws.convergence
    curve = {
        rank: {m: balanced_rank(law[pivot], law[m], rank, grid.num_samples, grid.grids[m]) for m in others}
        for rank in grid.grids[pivot]
    }
    return np.array([all(vector[m] == curve[vector[pivot]][m] for m in others) for vector in grid.vectors])


PAPER = LawPick("paper", pick_as_published, needs_convergence=True)
