"""The final run with the lowest validation loss, as what a search comes to."""

from collections.abc import Sequence

from mars_jax.errors import NoValidResultError
from mars_jax.search.selection import choice_text, without_laws
from mars_jax.search.strategies.base import Outcome, Space
from mars_jax.search.trainer import Curve, best_curve


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


def lowest_of(method: str, among: str, curves: Sequence[Curve], space: Space) -> Outcome:
    """The outcome of a strategy that keeps the final run with the lowest validation loss.

    Args:
        method: name of the strategy.
        among: what the final run was chosen from, such as "Of 4 final runs"; the explanation begins with it.
        curves: of all final runs.
        space: that was searched.

    Raises:
        NoValidResultError: no final run came to its end.
    """
    final = winner(curves, space)
    text = f"{among}, that of {chosen_text(final, space)} has the lowest validation loss, {final.loss:.4f} nats."
    return outcome_of(method, text, final, curves, space)


def outcome_of(method: str, text: str, final: Curve, curves: Sequence[Curve], space: Space) -> Outcome:
    """The outcome of a strategy that keeps one of its final runs; `text` says why."""
    ranks, factors = space.of_adapted(final.configuration.ranks), final.configuration.factors
    selection = without_laws(method, ranks, space.num_samples, text, factors, final.configuration.seed)
    return Outcome(selection, final, tuple(curves))


def chosen_text(curve: Curve, space: Space) -> str:
    """Ranks and factors of a final run, without frozen modules."""
    return choice_text(space.of_adapted(curve.configuration.ranks), curve.configuration.factors)
