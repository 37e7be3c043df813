"""Strategy `best_probes`: final runs of the best probes, halved by validation loss; the last is kept.

The laws take part in what is reported, not in what is picked: on tasks where the best ranks are known
(docs/evidence.md) the probes' own losses found better ranks than the laws' predictions.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar

from mars_jax.errors import ConfigError, NoValidResultError
from mars_jax.lanes.lane import Ranks
from mars_jax.search.selection import Selection, ranks_text
from mars_jax.search.strategies.base import DEFAULT_RUNS, Budget, Outcome, Probes, Space
from mars_jax.search.strategies.halving import halved
from mars_jax.search.strategies.law_pick import fitted_pick
from mars_jax.search.strategies.laws import pick_by_laws
from mars_jax.search.strategies.lowest import winner
from mars_jax.search.trainer import Trainer


class BestProbes:
    """Final runs of the best probes, halved in rungs."""

    name = "best_probes"
    probes: ClassVar[Probes] = "losses"
    takes_budget = True
    needs_convergence = False

    def begins(self, space: Space, budget: Budget) -> int:
        """See `Strategy`."""
        joint = sum(all(ranks[module] for module in space.adapted) for ranks in space.probed)
        return min(budget.runs or DEFAULT_RUNS, space.most_together, joint)

    def search(self, space: Space, trainer: Trainer, budget: Budget) -> Outcome:
        """See `Strategy`; the budget is the number of final runs that are begun, 4 by default."""
        records = trainer.probe(space.probed, space.sizes)
        by_laws = fitted_pick(pick_by_laws, space, records)
        vectors = best_probed(by_laws, self.begins(space, budget))
        curves = halved([space.configuration(ranks) for ranks in vectors], space, trainer)
        final = winner(curves, space)
        ended = [(space.of_adapted(c.configuration.ranks), c.loss) for c in curves if c.steps == space.steps]
        return Outcome(decided_by_final_runs(by_laws, ended), final, tuple(curves))


BEST_PROBES = BestProbes()


def best_probed(selection: Selection, most: int) -> tuple[Ranks, ...]:
    """Rank vectors of the `most` probes with the lowest losses, the best first; balanced or not."""
    probed = [(c.probed_loss, c.ranks) for c in selection.candidates if c.probed_loss is not None]
    return tuple(ranks for _, ranks in sorted(probed, key=lambda one: one[0])[:most])


def decided_by_final_runs(selection: Selection, results: Sequence[tuple[Ranks, float]]) -> Selection:
    """The selection after final runs: the candidate with the smallest validation loss.

    Args:
        selection: what the laws predict.
        results: (ranks, validation loss in nats) of each final run that came to its end.

    Returns:
        The selection with method `local_sweep`; `p_best` stays what the laws gave the new pick.

    Raises:
        ConfigError: a result is not of a candidate.
        NoValidResultError: no candidate has only finite losses.
    """
    losses: dict[int, float] = {}
    for ranks, loss in results:
        found = [i for i, candidate in enumerate(selection.candidates) if candidate.ranks == ranks]
        if not found:
            raise ConfigError(f"the sweep has a result for {ranks_text(ranks)}, which is not in the rank grid.")
        losses[found[0]] = loss
    ordered = sorted((i for i in losses if math.isfinite(losses[i])), key=lambda i: losses[i])
    if not ordered:
        raise NoValidResultError(
            f"the local sweep gave {len(results)} results, and no loss is finite. Lower the learning rate."
        )
    pick = selection.candidates[ordered[0]]
    ends = "; ".join(f"{ranks_text(selection.candidates[i].ranks)}: {losses[i]:.4f}" for i in ordered)
    agrees = (
        "which the laws had picked as well"
        if pick.ranks == selection.pick
        else f"where the laws had picked {ranks_text(selection.pick)}"
    )
    explanation = (
        f"Of the final runs that the best probes were given, those that came to their end have these validation losses "
        f"in nats: {ends}. The pick is {ranks_text(pick.ranks)}, {agrees}."
    )
    return dataclasses.replace(
        selection, pick=pick.ranks, p_best=pick.p_best, method="local_sweep", explanation=explanation
    )
