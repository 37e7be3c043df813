"""Stopping rules: which lanes go on, decided from their eval points alone.

Pure functions of eval points: a resumed run decides as an uninterrupted one does, and recorded curves can be replayed.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mars_jax.lanes.eval_points import EvalPoint, Points, best_loss
from mars_jax.lanes.halving import Rung, lane_steps, survivors

GoesOn = Callable[[int, float], bool]
"""Whether a run goes on after an eval point: (step, validation loss in nats) -> bool."""


class StoppingRule(ABC):
    """What ends lanes before their horizon.

    Attributes:
        needs_sample_losses: whether it reads `EvalPoint.sample_losses`.
    """

    needs_sample_losses = False

    @abstractmethod
    def running(self, points: Sequence[Points]) -> list[int]:
        """Lanes that go on, from the eval points of all of them so far; never one that is not alive."""

    @property
    def eval_steps(self) -> tuple[int, ...]:
        """Steps that must be eval points for the rule to decide there."""
        return ()

    def lane_steps(self, lanes: int, horizon: int) -> int:
        """Steps of all lanes together, if none diverges; used to plan programs, so an upper limit will do."""
        return lanes * horizon


def alive_lanes(points: Sequence[Points]) -> list[int]:
    """Lanes whose last eval point, if they have one, is alive."""
    return [k for k, of_lane in enumerate(points) if not of_lane or of_lane[-1].alive]


@dataclass(frozen=True)
class Patience(StoppingRule):
    """A lane stops when its step is `patience` times that of its best eval point; None: only when it diverges."""

    patience: float | None = None

    def running(self, points: Sequence[Points]) -> list[int]:
        """See `StoppingRule`."""
        return [k for k in alive_lanes(points) if not self._is_over(points[k])]

    def _is_over(self, points: Points) -> bool:
        if not points or self.patience is None:
            return False
        best = min(points, key=lambda point: point.validation_loss)
        return 0 < best.step * self.patience <= points[-1].step


@dataclass(frozen=True)
class Halving(StoppingRule):
    """At the end of each rung but the last, the worse half of the lanes stops (successive halving)."""

    rungs: tuple[Rung, ...]

    @property
    def eval_steps(self) -> tuple[int, ...]:
        """The ends of the rungs."""
        return tuple(rung.steps for rung in self.rungs)

    def lane_steps(self, lanes: int, horizon: int) -> int:
        """Steps of all rungs."""
        return lane_steps(self.rungs)

    def running(self, points: Sequence[Points]) -> list[int]:
        """See `StoppingRule`."""
        step = max((of_lane[-1].step for of_lane in points if of_lane), default=0)
        kept = list(range(len(points)))
        for rung in self.rungs[:-1]:
            if step < rung.steps:
                break
            # Of what was known at the rung: a lane that diverges later must not bring back one that has stopped.
            losses = [best_loss(points[k], rung.steps) for k in kept]
            kept = [kept[place] for place in survivors(losses, rung.survivors)]
        return [k for k in alive_lanes(points) if k in kept]


@dataclass(frozen=True)
class AskEach(StoppingRule):
    """Lanes stop at the first eval point after which `goes_on` says no. It may be asked again of the same point."""

    goes_on: GoesOn

    def running(self, points: Sequence[Points]) -> list[int]:
        """See `StoppingRule`."""
        return [
            k
            for k in alive_lanes(points)
            if all(self.goes_on(point.step, point.validation_loss) for point in points[k])
        ]


def replay(curves: Sequence[Points], stopping: StoppingRule) -> list[list[EvalPoint]]:
    """Recorded curves as far as lanes would have run under a stopping rule.

    Args:
        curves: eval points of each lane, run to its end; the steps of one lane are eval points of all.
        stopping: the rule.

    Returns:
        The eval points of each lane up to where it stops.
    """
    seen: list[list[EvalPoint]] = [[] for _ in curves]
    steps = sorted({point.step for points in curves for point in points})
    for step in steps:
        for k in stopping.running(seen):
            seen[k] += [point for point in curves[k] if point.step == step]
    return seen


def loss_ceiling(vocabulary: int) -> float:
    """1.5 times the loss of an even guess among `vocabulary` tokens, in nats: no model that still works is worse."""
    return 1.5 * math.log(vocabulary)


def divergence(first_loss: float, loss: float, ceiling: float) -> str | None:
    """Why a lane has diverged; None if it has not.

    Args:
        first_loss: its validation loss at step 0, nats.
        loss: its validation loss now, nats.
        ceiling: see `loss_ceiling`.
    """
    if not math.isfinite(loss):
        return "the validation loss was not finite"
    if loss > max(ceiling, 2.0 * first_loss):
        return f"the validation loss exploded to {loss:.3g} nats; guessing evenly gives {ceiling / 1.5:.3g}"
    return None
