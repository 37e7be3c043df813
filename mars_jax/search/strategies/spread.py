"""Configurations spread evenly over a space: the middle, frozen modules, then a Sobol sequence over step sizes."""

import math
from collections.abc import Iterator

from mars_jax.search.strategies.base import Budget, Space
from mars_jax.search.strategies.octaves import nearest
from mars_jax.search.trainer import Configuration

_DRAWN_PER_ASKED = 64  # points of the sequence that may fall on configurations which are chosen already


def number_begun(space: Space, budget: Budget, adapted: int) -> int:
    """Final runs to begin: the budget's, or `adapted` that train all modules and one for each that may be frozen."""
    return min(budget.runs or adapted + len(_freezable(space)), space.most_together)


def spread_configurations(space: Space, number: int) -> list[Configuration]:
    """Some of a space's configurations, without repeats; those first asked for stay when more are.

    A module's ranks and rates together are an axis of equally likely levels, in the order of their step sizes (rank
    times rate), which matter more than either (`laws.law_steps`). The points are a Sobol sequence (Sobol 1967,
    unscrambled, without its first point), so the first is in the middle. A point that may not be chosen stands for the
    nearest that may, in octaves of ranks and rates.

    Args:
        space: to choose from.
        number: how many, at most.
    """
    every = space.every()
    chosen: dict[str, Configuration] = {}
    for wanted in _in_order(space, number):
        found = nearest(space, every, wanted)
        chosen.setdefault(found.name, found)
        if len(chosen) == min(number, len(every)):
            break
    return list(chosen.values())


def _in_order(space: Space, number: int) -> Iterator[Configuration]:
    from scipy.stats import qmc

    middle = space.middle
    yield middle
    for module in _freezable(space):
        yield space.configuration({**middle.ranks, module: 0})
    axes = {module: _levels(space, module) for module in space.grids if _is_open(space, module)}
    if not axes:
        return
    count = 2 ** math.ceil(math.log2(_DRAWN_PER_ASKED * number + 1))
    for point in qmc.Sobol(len(axes), scramble=False).random(count)[1:]:
        levels = {m: of_module[int(x * len(of_module))] for (m, of_module), x in zip(axes.items(), point, strict=True)}
        ranks = {module: rank for module, (rank, _) in levels.items()}
        yield space.configuration(ranks, {module: levels[module][1] for module in space.factors if module in levels})


def _freezable(space: Space) -> list[str]:
    return [module for module in space.searched if 0 in space.grids[module]]


def _is_open(space: Space, module: str) -> bool:
    return module in space.searched or module in space.factors


def _levels(space: Space, module: str) -> list[tuple[int, float]]:
    """Ranks and factors of a module, by their product; a frozen module has no rate."""
    factors = space.factors.get(module, (1.0,))
    levels = [(rank, factor) for rank in space.grids[module] for factor in (factors if rank else (1.0,))]
    return sorted(levels, key=lambda level: (level[0] * level[1], level[0]))
