"""Strategies that fit the laws to probes and let the laws pick: `laws` and `paper` differ in the rule of the pick."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from mars_jax.laws.fit import Laws
from mars_jax.laws.records import LaneRecord
from mars_jax.search.candidates import ProbedLosses
from mars_jax.search.probes.records import probed_losses
from mars_jax.search.selection import Selection
from mars_jax.search.strategies.base import Budget, Outcome, Probes, Space
from mars_jax.search.trainer import Trainer


class PickRule(Protocol):
    """Picks ranks from the grid at the target number of samples."""

    def __call__(
        self,
        laws: Laws,
        grids: Mapping[str, Sequence[int]],
        num_samples: int,
        parameters_per_rank: Mapping[str, int],
        probed: ProbedLosses = (),
    ) -> Selection:
        """See `laws.pick_by_laws`."""
        ...


def fitted_pick(rule: PickRule, space: Space, records: Sequence[LaneRecord]) -> Selection:
    """Fits the laws to records of probes, and picks by a rule."""
    losses = probed_losses(records, list(space.adapted))
    return rule(space.fit(records), space.adapted, space.num_samples, space.parameters_per_rank, losses)


@dataclass(frozen=True)
class LawPick:
    """Strategy that probes, fits the laws, and picks by a rule; it trains no final run.

    Attributes:
        name: in configs.
        rule: of the pick.
        needs_convergence: whether the rule reads convergence times.
    """

    name: str
    rule: PickRule
    needs_convergence: bool
    probes: ClassVar[Probes] = "losses"
    takes_budget = False

    def begins(self, space: Space, budget: Budget) -> int:
        """See `Strategy`."""
        return 0

    def search(self, space: Space, trainer: Trainer, budget: Budget) -> Outcome:
        """See `Strategy`; the pick is not trained yet."""
        return Outcome(fitted_pick(self.rule, space, trainer.probe(space.probed, space.sizes)))
