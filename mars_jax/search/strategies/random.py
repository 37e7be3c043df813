"""Strategy `random`: final runs of ranks and rates drawn at random, each to its end; the best is kept."""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from mars_jax.lanes.stopping import Patience
from mars_jax.search.strategies.base import DEFAULT_RUNS, Budget, Outcome, Probes, Space
from mars_jax.search.strategies.lowest import lowest_of
from mars_jax.search.trainer import Configuration, Trainer


class RandomSearch:
    """The best of randomly drawn configurations."""

    name = "random"
    probes: ClassVar[Probes] = "none"
    takes_budget = True
    needs_convergence = False

    def configurations(self, space: Space, budget: Budget) -> Sequence[Configuration]:
        """Those that are drawn, without repeats; by default 4, and at least 2."""
        every = space.every()
        order = np.random.default_rng(space.seed).permutation(len(every))
        return [every[i] for i in order[: max(2, budget.runs or DEFAULT_RUNS)]]

    def begins(self, space: Space, budget: Budget) -> int:
        """See `Strategy`."""
        return len(self.configurations(space, budget))

    def search(self, space: Space, trainer: Trainer, budget: Budget) -> Outcome:
        """See `Strategy`; the budget is the number of runs."""
        curves = trainer.train(self.configurations(space, budget), Patience())
        among = f"Of the final runs of {len(curves)} configurations drawn at random"
        return lowest_of(self.name, among, curves, space)


RANDOM = RandomSearch()
