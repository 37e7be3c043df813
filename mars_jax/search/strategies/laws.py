"""Strategy `laws`: MARS generalised. The laws pick, and the pick is trained.

Keep the rank vectors whose searched modules converge within tau of each other by Law-C, and take the one with the
fewest parameters whose loss, expected by Law-P in the form that fits best, is within 0.5 % of the smallest.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from mars_jax.laws.fit import Laws, determined
from mars_jax.search.candidates import ProbedLosses, Pruning, RankGrid, least_unbalanced, pick_among, rank_grid
from mars_jax.search.selection import Selection
from mars_jax.search.strategies.law_pick import LawPick

# Losses that differ by less than this share are as good as each other: neither probes nor final runs distinguish them.
_TIE = 0.005


def pick_by_laws(
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
        The selection; `fallback` is set, and the least unbalanced vector picked, when none is balanced. Where a
        searched module has no Law-C, the smallest expected loss of the grid decides, and `fallback` is set if one was
        tried for.

    Raises:
        ConfigError: the grid, the laws and the parameter counts do not belong together.
    """
    grid = rank_grid(laws, grids, num_samples, parameters_per_rank)
    draws = determined(laws.performance).loss_draws(grid.vectors, num_samples)
    fallback = None
    if grid.imbalance is None or grid.tau is None:
        kept = np.ones(len(grid.vectors), bool)
        if laws.untimed:
            fallback = (
                "Whether the modules converge together is not known, so the smallest predicted loss alone decides. "
                + " ".join(laws.untimed.values())
            )
        reasons, allowed = [grid.apart(i) for i in range(len(kept))], ""
    else:
        kept = grid.imbalance <= grid.tau
        if not kept.any():
            kept, fallback = least_unbalanced(grid, grid.imbalance, grid.tau)
        reasons = [_reason(grid, i, bool(kept[i]), grid.tau, fallback) for i in range(len(kept))]
        allowed = f"allowed {math.exp(grid.tau):.2f}"
    return pick_among(
        grid,
        Pruning(
            method="laws",
            kept=kept,
            reasons=reasons,
            score=draws.mean(axis=0),
            draws=draws,
            tie=_TIE,
            fallback=fallback,
            allowed=allowed,
            lowest=f"the smallest, or within {100 * _TIE:.1f} % of it with the fewest parameters",
        ),
        probed,
    )


def _reason(grid: RankGrid, place: int, kept: bool, tau: float, fallback: str | None) -> str:
    if kept and fallback:
        return f"{grid.apart(place)}; more than {math.exp(tau):.2f}, but the least of the grid"
    return f"{grid.apart(place)}; {'within' if kept else 'more than'} {math.exp(tau):.2f}"


LAWS = LawPick("laws", pick_by_laws, needs_convergence=False)
