"""Strategy `halving`: final runs of a cross design of ranks and rates, halved by validation loss, without any probe.

Successive halving (Jamieson and Talwalkar 2016) on the final schedule: the last one is the final run.
"""

import itertools
from collections.abc import Sequence
from typing import ClassVar

from mars_jax.lanes.halving import halving_schedule
from mars_jax.lanes.stopping import Halving
from mars_jax.search.strategies.base import Budget, Outcome, Probes, Space
from mars_jax.search.strategies.lowest import lowest_of
from mars_jax.search.trainer import Configuration, Curve, Trainer, distinct


class HalvingStrategy:
    """Final runs of a cross design, halved in rungs; nothing is probed."""

    name = "halving"
    probes: ClassVar[Probes] = "none"
    takes_budget = True
    needs_convergence = False

    def begins(self, space: Space, budget: Budget) -> int:
        """See `Strategy`."""
        number = len(cross_design(space))
        return min(budget.runs or number, space.most_together, number)

    def search(self, space: Space, trainer: Trainer, budget: Budget) -> Outcome:
        """See `Strategy`; the budget is the number of runs that are begun, by default all of the design."""
        number = self.begins(space, budget)
        curves = halved(cross_design(space)[:number], space, trainer)
        return lowest_of(self.name, f"Of the final runs of {number} configurations, halved in rungs", curves, space)


HALVING = HalvingStrategy()


def cross_design(space: Space) -> list[Configuration]:
    """The probes' rank vectors at the usual rates, and each module's other rates at the middle ranks, in turn."""
    vectors = [
        space.configuration(ranks)
        for ranks in space.probed
        if any(ranks.values()) and all(ranks[module] in grid for module, grid in space.grids.items())
    ]
    middle = space.middle.ranks
    rated = [space.configuration(middle, {module: factor}) for module, grid in space.factors.items() for factor in grid]
    mixed = itertools.chain.from_iterable(itertools.zip_longest(vectors, rated))
    return distinct(configuration for configuration in mixed if configuration)


def halved(configurations: Sequence[Configuration], space: Space, trainer: Trainer) -> list[Curve]:
    """Successive halving over final runs of some configurations."""
    return trainer.train(configurations, Halving(halving_schedule(len(configurations), space.steps)))
