"""Distances between configurations, in octaves of ranks and rates."""

import math
from collections.abc import Sequence

import numpy as np

from mars_jax.search.strategies.base import Space
from mars_jax.search.trainer import Configuration


def nearest(space: Space, every: Sequence[Configuration], configuration: Configuration) -> Configuration:
    """Of all configurations that may be chosen, the one nearest to one that perhaps may not."""
    if configuration in every:
        return configuration
    distances = np.linalg.norm(octaves(space, every) - octaves(space, [configuration]), axis=1)
    return every[int(np.argmin(distances))]


def octaves(space: Space, configurations: Sequence[Configuration]) -> np.ndarray:
    """Octaves of the ranks and rates that can be chosen, [Q, n]; a frozen module is two octaves below rank 1."""
    return np.asarray(
        [
            [
                *(math.log2(one.ranks[module]) if one.ranks[module] else -2.0 for module in space.searched),
                *(math.log2(one.factors.get(module, 1.0)) for module in space.factors),
            ]
            for one in configurations
        ]
    )
