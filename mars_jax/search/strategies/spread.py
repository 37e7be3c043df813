"""Configurations spread evenly over a space: a Sobol sequence over its ranks and rates, the middle first."""

import math
from collections.abc import Sequence
from typing import TypeVar

from mars_jax.search.strategies.base import Space
from mars_jax.search.strategies.octaves import nearest
from mars_jax.search.trainer import Configuration

T = TypeVar("T")

_DRAWN_PER_ASKED = 64  # points of the sequence that may fall on configurations which are chosen already


def spread_configurations(space: Space, number: int) -> list[Configuration]:
    """Some of a space's configurations, without repeats; those first asked for stay when more are.

    Each module's ranks, and its rates, are an axis of equally likely levels (Sobol 1967, unscrambled, without its first
    point). A point that may not be chosen stands for the nearest that may, in octaves of ranks and rates.

    Args:
        space: to choose from.
        number: how many, at most.
    """
    from scipy.stats import qmc

    every, searched = space.every(), space.searched
    if not searched and not space.factors:
        return every[:1]
    count = 2 ** math.ceil(math.log2(_DRAWN_PER_ASKED * number + 1))
    points = qmc.Sobol(len(searched) + len(space.factors), scramble=False).random(count)[1:]
    chosen: dict[str, Configuration] = {}
    for point in points:
        ranks = {m: _level(space.grids[m], share) for m, share in zip(searched, point, strict=False)}
        rates = zip(space.factors, point[len(searched) :], strict=True)
        factors = {module: _level(space.factors[module], share) for module, share in rates}
        found = nearest(space, every, space.configuration(ranks, factors))
        chosen.setdefault(found.name, found)
        if len(chosen) == min(number, len(every)):
            break
    return list(chosen.values())


def _level(grid: Sequence[T], share: float) -> T:
    """The element of a grid at a share in [0, 1) of its length."""
    return grid[int(share * len(grid))]
