"""Strategy `race`: a few spread configurations are begun as final runs, and stop once they can't win any more."""

from collections.abc import Sequence
from typing import ClassVar

from mars_jax.lanes.race import PairedRace, paired_error
from mars_jax.search.strategies.base import Budget, Outcome, Probes, Space
from mars_jax.search.strategies.lowest import chosen_text, outcome_of, winner
from mars_jax.search.strategies.spread import number_begun, spread_configurations
from mars_jax.search.trainer import Curve, Trainer

BEGUN = 6
"""Final runs that are begun where the config has no number, and one more for each module that may be frozen."""


class Race:
    """Final runs of spread configurations, raced."""

    name = "race"
    probes: ClassVar[Probes] = "none"
    takes_budget = True
    needs_convergence = False

    def begins(self, space: Space, budget: Budget) -> int:
        """See `Strategy`."""
        return number_begun(space, budget, BEGUN)

    def search(self, space: Space, trainer: Trainer, budget: Budget) -> Outcome:
        """See `Strategy`; the budget is the number of runs that are begun."""
        return raced_outcome(self.name, spread_and_raced(space, trainer, self.begins(space, budget)), space)


RACE = Race()


def spread_and_raced(space: Space, trainer: Trainer, number: int) -> list[Curve]:
    """Final runs of some spread configurations, which stop once they can't win any more."""
    return trainer.train(spread_configurations(space, number), PairedRace(space.steps))


def raced_outcome(method: str, curves: Sequence[Curve], space: Space) -> Outcome:
    """Of the final runs of a race that end as well as the best, the smallest.

    Args:
        method: name of the strategy.
        curves: of all runs that were begun.
        space: that was searched.

    Raises:
        NoValidResultError: no final run came to its end.
    """
    best = winner(curves, space)
    equal = [curve for curve in curves if curve.steps == space.steps and is_equal(curve, best)]
    final = min(equal, key=lambda curve: (space.parameters(curve.configuration), curve.loss))
    ended = sum(curve.steps == space.steps for curve in curves)
    text = f"{len(curves)} final runs were begun; {ended} came to {'its' if ended == 1 else 'their'} end. "
    if final is best:
        text += f"That of {chosen_text(best, space)} has the lowest validation loss, {best.loss:.4f} nats."
    else:
        text += (
            "These are equal within the noise of the validation samples: "
            f"{'; '.join(f'{chosen_text(c, space)}: {c.loss:.4f}' for c in equal)} nats. The pick has the fewest "
            "parameters of them."
        )
    return outcome_of(method, text, final, curves, space)


def is_equal(curve: Curve, best: Curve) -> bool:
    """Whether two final losses differ by at most a standard error, over the validation samples at the last step.

    The one-standard-error rule (Breiman et al. 1984), for paired differences.
    """
    return curve is best or curve.loss - best.loss <= paired_error(
        curve.points[-1].sample_losses, best.points[-1].sample_losses
    )
