"""Strategy `separate_rates`: a uniform rank, and the learning rate of one module at a time a third or three times."""

from collections.abc import Sequence

from mars_jax.lanes.stopping import Patience
from mars_jax.search.selection import ranks_text, without_laws
from mars_jax.search.strategies.base import Budget, Outcome, Space
from mars_jax.search.strategies.halving import winner
from mars_jax.search.strategies.uniform import UNIFORM
from mars_jax.search.trainer import Configuration, Trainer

_FACTORS = (1 / 3, 3.0)


class SeparateRates:
    """A uniform rank, and one module's learning rate a third or three times the others'."""

    name = "separate_rates"
    needs_probes = False
    takes_budget = False
    needs_convergence = False

    def configurations(self, space: Space, budget: Budget) -> Sequence[Configuration]:
        """The middle uniform rank at the config's rates, then with each module's rate changed."""
        (middle,) = UNIFORM.configurations(space, budget)
        changed = [{module: factor} for module in space.searched for factor in _FACTORS]
        return [middle, *(space.configuration(middle.ranks, factors) for factors in changed)]

    def search(self, space: Space, trainer: Trainer, budget: Budget) -> Outcome:
        """See `Strategy`."""
        curves = trainer.train(self.configurations(space, budget), Patience())
        final = winner(curves, space)
        ranks = space.of_adapted(final.configuration.ranks)
        rates = ", ".join(f"{module} {factor:.3g}" for module, factor in final.configuration.factors.items())
        explanation = (
            f"Of {len(curves)} final runs with ranks {ranks_text(ranks)} and the learning rate of one module changed, "
            f"the one with factors {rates or 'of 1'} has the lowest validation loss, {final.loss:.4f} nats."
        )
        return Outcome(without_laws(self.name, ranks, space.num_samples, explanation), final, tuple(curves))


SEPARATE_RATES = SeparateRates()
