"""Strategy `laws+race`: final runs are raced, Law-P of those proposes more, and these race the leader."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

from mars_jax.lanes.race import PairedRace
from mars_jax.laws.law_steps import StepLaw
from mars_jax.search.selection import Selection
from mars_jax.search.strategies.base import Budget, Outcome, Probes, Space
from mars_jax.search.strategies.lowest import winner
from mars_jax.search.strategies.propose import proposals, step_law
from mars_jax.search.strategies.race import raced_outcome, spread_and_raced
from mars_jax.search.strategies.spread import number_begun
from mars_jax.search.trainer import Curve, Trainer

BEGUN = 5
"""Final runs that are begun before the law proposes, and one more for each module that may be frozen, where the config
has no number."""

PROPOSED = 2
"""Final runs that the law proposes."""


class LawsRace:
    """Spread configurations are raced; then those that the law of these runs expects to be best."""

    name = "laws+race"
    probes: ClassVar[Probes] = "convergence"
    takes_budget = True
    needs_convergence = False

    def begins(self, space: Space, budget: Budget) -> int:
        """See `Strategy`."""
        return number_begun(space, budget, BEGUN) + PROPOSED

    def search(self, space: Space, trainer: Trainer, budget: Budget) -> Outcome:
        """See `Strategy`; the budget is the number of runs that are begun before the law proposes."""
        begun = spread_and_raced(space, trainer, number_begun(space, budget, BEGUN))
        curves = propose_and_race(begun, space, trainer, PROPOSED)
        outcome = raced_outcome(self.name, curves, space)
        law = step_law(curves, space)
        if law is None:
            return outcome
        text = f"{outcome.selection.explanation} {_doublings(law, outcome.selection, space, curves)}"
        return replace(outcome, selection=replace(outcome.selection, step_law=law, explanation=text.strip()))


LAWS_RACE = LawsRace()


def propose_and_race(curves: Sequence[Curve], space: Space, trainer: Trainer, number: int) -> list[Curve]:
    """Final runs, and those that the law of them proposes, which have to beat the leader to come to their end."""
    proposed = proposals(curves, space, number)
    if not proposed:
        return list(curves)
    leader = winner(curves, space)
    return [*curves, *trainer.train(proposed, PairedRace(space.steps, against=leader.points))]


def _doublings(law: StepLaw, pick: Selection, space: Space, curves: Sequence[Curve]) -> str:
    """What twice the rank or rate of each module of the pick is expected to change, in words."""
    if not all(pick.pick.get(module) for module in law.modules):
        return ""
    ranks = {module: [pick.pick[module]] for module in law.modules}
    rates = {module: [space.rates[module] * pick.factors.get(module, 1.0)] for module in law.modules}
    here = float(law.log_loss(ranks, rates)[0])
    twice = {m: float(law.log_loss(ranks | {m: [2 * pick.pick[m]]}, rates)[0]) - here for m in law.modules}
    changes = " and ".join(f"{100 * math.expm1(change):+.1f} % for {module}" for module, change in twice.items())
    fitted = sum(all(curve.configuration.ranks[module] for module in law.modules) for curve in curves)
    return (
        f"By Law-P in step sizes, fitted to {fitted} of these runs, twice the rank or twice the learning rate would "
        f"change the loss by {changes}."
    )
