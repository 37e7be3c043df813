"""Configurations spread over a space: the middle first, then each as far from those before as there is."""

import math
from collections.abc import Sequence

import numpy as np

from mars_jax.search.strategies.base import Space
from mars_jax.search.trainer import Configuration

_RATE_OCTAVES = 2.0  # A rate matters more than a rank: an octave of it counts as two.


def spread_configurations(space: Space, number: int) -> list[Configuration]:
    """Some of a space's configurations, without repeats.

    Distances are in octaves of ranks and rates. Those that freeze a module are far from all others, so they come early
    where the space has them.

    Args:
        space: to choose from.
        number: how many, at most.
    """
    every = space.every()
    places = coordinates(space, every)
    from_middle = np.linalg.norm(places - coordinates(space, [space.middle]), axis=1)
    chosen = [int(np.argmin(from_middle))]
    nearest = np.linalg.norm(places - places[chosen[0]], axis=1)
    while len(chosen) < min(number, len(every)):
        chosen.append(int(np.argmax(nearest)))
        nearest = np.minimum(nearest, np.linalg.norm(places - places[chosen[-1]], axis=1))
    return [every[place] for place in chosen]


def coordinates(space: Space, configurations: Sequence[Configuration]) -> np.ndarray:
    """Octaves of the ranks and of the rates of what can be chosen, [Q, n]; a frozen module is two below rank 1."""
    return np.asarray(
        [
            [
                *(math.log2(one.ranks[module]) if one.ranks[module] else -2.0 for module in space.searched),
                *(_RATE_OCTAVES * math.log2(one.factors.get(module, 1.0)) for module in space.factors),
            ]
            for one in configurations
        ]
    ).reshape(len(configurations), -1)
