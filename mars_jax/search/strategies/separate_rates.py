"""Strategy `separate_rates`: a uniform rank, and another learning rate of one module at a time."""

from collections.abc import Sequence
from typing import ClassVar

from mars_jax.lanes.stopping import Patience
from mars_jax.search.strategies.base import Budget, Outcome, Probes, Space
from mars_jax.search.strategies.lowest import lowest_of
from mars_jax.search.strategies.uniform import UNIFORM
from mars_jax.search.trainer import Configuration, Trainer, distinct

_FACTORS = (1 / 3, 3.0)


class SeparateRates:
    """A uniform rank, and other learning rates of one module: those to choose among, or a third and three times."""

    name = "separate_rates"
    probes: ClassVar[Probes] = "none"
    takes_budget = False
    needs_convergence = False

    def configurations(self, space: Space, budget: Budget) -> Sequence[Configuration]:
        """The middle uniform rank at the usual rates, then with each module's rate changed."""
        (middle,) = UNIFORM.configurations(space, budget)
        modules = [module for module in space.grids if module in space.searched or module in space.factors]
        changed = [{module: factor} for module in modules for factor in space.factors.get(module, _FACTORS)]
        return distinct([middle, *(space.configuration(middle.ranks, factors) for factors in changed)])

    def begins(self, space: Space, budget: Budget) -> int:
        """See `Strategy`."""
        return len(self.configurations(space, budget))

    def search(self, space: Space, trainer: Trainer, budget: Budget) -> Outcome:
        """See `Strategy`."""
        curves = trainer.train(self.configurations(space, budget), Patience())
        among = f"Of {len(curves)} final runs with these ranks and the learning rate of one module changed"
        return lowest_of(self.name, among, curves, space)


SEPARATE_RATES = SeparateRates()
