"""Strategy `halving`: final runs of the design's rank vectors, halved by validation loss, without any probe.

Successive halving (Jamieson and Talwalkar 2016) on the final schedule: the last one is the final run.
"""

from collections.abc import Sequence

from mars_jax.errors import NoValidResultError
from mars_jax.lanes.halving import halving_schedule
from mars_jax.lanes.stopping import Halving
from mars_jax.search.selection import ranks_text, without_laws
from mars_jax.search.strategies.base import Budget, Outcome, Space
from mars_jax.search.trainer import Configuration, Curve, Trainer, best_curve


class HalvingStrategy:
    """Final runs of the rank vectors of the probes' design, halved in rungs; nothing is probed."""

    name = "halving"
    needs_probes = False
    takes_budget = True
    needs_convergence = False

    def search(self, space: Space, trainer: Trainer, budget: Budget) -> Outcome:
        """See `Strategy`; the budget is the number of runs that are begun, by default all of the design."""
        vectors = [ranks for ranks in space.probed if all(ranks[module] for module in space.adapted)]
        number = min(budget.runs or len(vectors), space.most_together, len(vectors))
        curves = halved([space.configuration(ranks) for ranks in vectors[:number]], space, trainer)
        final = winner(curves, space)
        ranks = space.of_adapted(final.configuration.ranks)
        selection = without_laws(
            self.name,
            ranks,
            space.num_samples,
            f"Of the final runs of {number} rank vectors, halved in rungs, that of {ranks_text(ranks)} has the lowest "
            f"validation loss, {final.loss:.4f} nats.",
        )
        return Outcome(selection, final, tuple(curves))


HALVING = HalvingStrategy()


def halved(configurations: Sequence[Configuration], space: Space, trainer: Trainer) -> list[Curve]:
    """Successive halving over final runs of some configurations."""
    return trainer.train(configurations, Halving(halving_schedule(len(configurations), space.steps)))


def winner(curves: Sequence[Curve], space: Space) -> Curve:
    """The curve with the lowest loss of those that came to the end.

    Raises:
        NoValidResultError: none did.
    """
    best = best_curve(curves, space.steps)
    if best is None:
        reasons = "; ".join(f"{curve.configuration.name}: {curve.reason}" for curve in curves)
        raise NoValidResultError(
            f"no final run came to its end ({reasons}). Lower finetune.learning_rate (now {dict(space.rates)})."
        )
    return best
