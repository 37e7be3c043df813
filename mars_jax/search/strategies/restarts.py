"""Strategy `restarts`: the middle configuration, drawn again a few times; the best run is kept.

What any search has to beat: runs of one configuration differ, and the best of several is better than one.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

from mars_jax.lanes.stopping import Patience
from mars_jax.search.strategies.base import DEFAULT_RUNS, Budget, Outcome, Probes, Space
from mars_jax.search.strategies.lowest import lowest_of
from mars_jax.search.trainer import Configuration, Trainer


class Restarts:
    """Final runs of the middle ranks at the usual rates, which differ in the draw of their adapters."""

    name = "restarts"
    probes: ClassVar[Probes] = "none"
    takes_budget = True
    needs_convergence = False

    def configurations(self, space: Space, budget: Budget) -> Sequence[Configuration]:
        """Those that are trained."""
        return [replace(space.middle, seed=seed) for seed in range(budget.runs or DEFAULT_RUNS)]

    def begins(self, space: Space, budget: Budget) -> int:
        """See `Strategy`."""
        return len(self.configurations(space, budget))

    def search(self, space: Space, trainer: Trainer, budget: Budget) -> Outcome:
        """See `Strategy`; the budget is the number of runs."""
        curves = trainer.train(self.configurations(space, budget), Patience())
        return lowest_of(self.name, f"Of {len(curves)} final runs with other draws of the adapters", curves, space)


RESTARTS = Restarts()
