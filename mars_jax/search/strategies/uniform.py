"""Strategy `uniform`: one rank for all searched modules, as people guess it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from mars_jax.errors import ConfigError
from mars_jax.lanes.stopping import Patience
from mars_jax.search.strategies.base import Budget, Outcome, Probes, Space
from mars_jax.search.strategies.lowest import outcome_of, winner
from mars_jax.search.trainer import Configuration, Trainer


@dataclass(frozen=True)
class Uniform:
    """One rank for all searched modules.

    Attributes:
        rank: the rank; None: the middle one of those that all grids share.
    """

    rank: int | None = None

    name = "uniform"
    probes: ClassVar[Probes] = "none"
    takes_budget = False
    needs_convergence = False

    def configurations(self, space: Space, budget: Budget) -> Sequence[Configuration]:
        """The one that is trained.

        Raises:
            ConfigError: the grids share no rank.
        """
        if not space.searched:
            return [space.configuration({})]
        shared = shared_ranks(space)
        if not shared:
            raise ConfigError(
                f"selection.method: uniform needs a rank that all searched modules have; the grids of "
                f"{', '.join(space.searched)} share none. Give them one in lora.modules."
            )
        rank = self.rank or shared[len(shared) // 2]
        return [space.configuration(dict.fromkeys(space.searched, rank))]

    def begins(self, space: Space, budget: Budget) -> int:
        """See `Strategy`."""
        return len(self.configurations(space, budget))

    def search(self, space: Space, trainer: Trainer, budget: Budget) -> Outcome:
        """See `Strategy`."""
        curves = trainer.train(self.configurations(space, budget), Patience())
        final = winner(curves, space)
        ranks = final.configuration.ranks
        taken = f"Rank {ranks[space.searched[0]]} was" if space.searched else "The given ranks were"
        explanation = f"{taken} taken for every {'searched ' if space.searched else ''}module; nothing was searched."
        return outcome_of(self.name, explanation, final, curves, space)


UNIFORM = Uniform()


def shared_ranks(space: Space) -> list[int]:
    """Ranks above 0 that the grids of all searched modules have."""
    grids = [set(space.grids[module]) for module in space.searched]
    return sorted(set.intersection(*grids) - {0}) if grids else []
