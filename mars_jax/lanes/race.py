"""Paired race: lanes stop once the losses of the same validation samples say that they can't win any more.

Pure functions of eval points. A lane's final loss is not known at a rung, so what a rung shows is widened by how much
standings changed over the last doubling of steps: the race measures its own noise, whatever the model.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mars_jax.lanes.eval_points import EvalPoint, Points
from mars_jax.lanes.stopping import StoppingRule, alive_lanes

_LEAST_LOSS = 1e-9  # nats; the log of a loss of 0 is no number
_ENDED = -1  # number of the run that has ended, beside those of the lanes
RUNGS = (1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8)
"""Parts of a run at which lanes may stop. Before a quarter the order says little of the end (docs/evidence.md)."""


@dataclass(frozen=True)
class PairedRace(StoppingRule):
    """At each rung, lanes stop whose chance to end below the leader by more than a margin is small.

    The difference of two lanes at the end is taken for normal about that at the rung, with the standard error of the
    paired difference over validation samples and a spread for what is still to come: how much differences of log losses
    changed since the last eval point at or before half of the rung's step (standard deviation over lanes, at least half
    of that of the rung before), times the share of the steps that is left. The leader is the lane with the lowest loss
    at the rung.

    Attributes:
        horizon: the last step.
        margin: share of the leader's loss by which a win counts, such as 0.005.
        chance: probability of such a win below which a lane stops, in (0, 0.5).
        against: eval points of a run that has ended, which the lanes have to beat as well.
    """

    horizon: int
    margin: float = 0.005
    chance: float = 0.15
    against: Points = ()

    needs_sample_losses = True

    @property
    def rungs(self) -> tuple[int, ...]:
        """Steps at which lanes may stop."""
        return tuple(dict.fromkeys(max(1, round(part * self.horizon)) for part in RUNGS))

    @property
    def eval_steps(self) -> tuple[int, ...]:
        """The rungs, and half of the step of the first."""
        return tuple(sorted({max(1, self.rungs[0] // 2), *self.rungs}))

    def running(self, points: Sequence[Points]) -> list[int]:
        """See `StoppingRule`."""
        step = max((of_lane[-1].step for of_lane in points if of_lane), default=0)
        curves = dict(enumerate(points)) | ({_ENDED: self.against} if self.against else {})
        kept, spread = list(curves), 0.0
        for rung in self.rungs:
            if step < rung:
                break
            here = {k: point for k in kept if (point := _at(curves[k], rung)) is not None}
            if not here:  # All have diverged, or the rung was no eval point of theirs.
                continue
            before = {k: point for k in here if (point := _by(curves[k], max(1, rung // 2))) is not None}
            spread = max(spread / 2, _spread([here[k] for k in before], list(before.values())))
            kept = self._kept(here, spread * (1 - rung / self.horizon))
        return [k for k in alive_lanes(points) if k in kept]

    def _kept(self, here: dict[int, EvalPoint], spread: float) -> list[int]:
        """Lanes that may still win, from their eval points at a rung."""
        leader = min(here, key=lambda k: here[k].validation_loss)
        return [k for k in here if k == leader or self.win_chance(here[k], here[leader], spread) >= self.chance]

    def win_chance(self, point: EvalPoint, leader: EvalPoint, spread: float) -> float:
        """Probability that a lane ends below the leader by more than the margin, from an eval point of both.

        Args:
            point: of the lane.
            leader: of the leader, at the same step.
            spread: standard deviation of what log losses still change, of one lane against another.
        """
        difference = point.validation_loss - leader.validation_loss
        deviation = math.hypot(paired_error(point.sample_losses, leader.sample_losses), spread * leader.validation_loss)
        behind = difference + self.margin * leader.validation_loss
        return 0.0 if deviation == 0 else 0.5 * math.erfc(behind / deviation / math.sqrt(2))


def paired_error(left: Sequence[float], right: Sequence[float]) -> float:
    """Standard error of the mean difference of two models' losses of the same samples [N], nats; 0 where N < 2."""
    differences = np.subtract(left, right)
    return float(differences.std(ddof=1) / math.sqrt(len(differences))) if len(differences) > 1 else 0.0


def _at(points: Points, step: int) -> EvalPoint | None:
    """The eval point at a step; None where the lane had stopped or diverged by then."""
    return next((point for point in points if point.step == step and point.alive), None)


def _by(points: Points, step: int) -> EvalPoint | None:
    """The last eval point at or before a step, but for the one before training."""
    return next((point for point in reversed(points) if 0 < point.step <= step), None)


def _spread(here: Sequence[EvalPoint], before: Sequence[EvalPoint]) -> float:
    """Standard deviation of the change of a difference of two log losses between two eval points of some lanes."""
    losses = np.array([[new.validation_loss, old.validation_loss] for new, old in zip(here, before, strict=True)])
    changes = np.diff(np.log(np.maximum(losses, _LEAST_LOSS))) if len(losses) else losses
    return math.sqrt(2.0) * float(np.std(changes, ddof=1)) if len(changes) > 1 else 0.0
