"""When lanes may stop before their horizon, told from their looks alone: a lane diverged, or its best lies far behind.

Pure functions of rows, so a resumed run decides as an uninterrupted one does. What the looks mean for the laws is in
`mars_jax.laws.convergence.registry`.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    pass
from mars_jax.lanes.halving import Rung, survivors

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Leaving:
    """Why a lane leaves.

    Attributes:
        patience: a lane leaves when its step is this many times that of its best look; None: never.
        ceiling: validation loss, in nats, above which a lane has diverged.
    """

    patience: float | None = None
    ceiling: float = math.inf

    def running(self, rows: Sequence[Sequence[Row]]) -> list[int]:
        """Lanes that go on, from the rows of all of them, one a look."""
        return [k for k, lane_rows in enumerate(rows) if not self._is_over(lane_rows)]

    def divergence(self, first_loss: float, loss: float) -> str | None:
        """Why a lane whose validation loss, in nats, was first one and is now the other has diverged; None if not."""
        if not math.isfinite(loss):
            return "the validation loss was not finite"
        if loss > max(self.ceiling, 2.0 * first_loss):
            return f"the validation loss exploded to {loss:.3g} nats; guessing evenly gives {self.ceiling / 1.5:.3g}"
        return None

    def _is_over(self, rows: Sequence[Row]) -> bool:
        if not rows:
            return False
        if not rows[-1]["alive"]:
            return True
        best = min(rows, key=lambda row: row["validation_loss"])
        return self.patience is not None and 0 < best["step"] * self.patience <= rows[-1]["step"]


def ceiling_of(vocabulary: int) -> float:
    """1.5 times the loss of an even guess among `vocabulary` tokens, in nats: no model that still works is worse."""
    return 1.5 * math.log(vocabulary)


@dataclass(frozen=True)
class AskEach(Leaving):
    """One lane, that leaves when it is told to."""

    goes_on: "GoesOn" = lambda step, loss: True

    def running(self, rows: Sequence[Sequence[Row]]) -> list[int]:
        """The lane, unless an answer to one of its looks was no."""
        alive = super().running(rows)
        return [k for k in alive if all(self.goes_on(row["step"], row["validation_loss"]) for row in rows[k])]


Look = tuple[int, float]  # step, and validation loss in nats; infinite where the run diverged
GoesOn = Callable[[int, float], bool]  # told of the next look


def until_stopped(looks: Iterable[Look], goes_on: GoesOn) -> list[Look]:
    """Looks up to the first after which a run doesn't go on."""
    found = []
    for look in looks:
        found.append(look)
        if not goes_on(*look):
            break
    return found


@dataclass(frozen=True)
class Halving(Leaving):
    """At the end of each rung but the last, the worse half of the lanes leaves too."""

    rungs: tuple[Rung, ...] = ()

    def running(self, rows: Sequence[Sequence[Row]]) -> list[int]:
        """Lanes that go on, from the rows of all of them, one a look."""
        step = max((lane_rows[-1]["step"] for lane_rows in rows if lane_rows), default=0)
        kept = list(range(len(rows)))
        for rung in self.rungs[:-1]:
            if step < rung.steps:
                break
            # Of what was known at the rung: a lane that diverges later must not bring back one that has left.
            losses = [best_loss(rows[k], rung.steps) for k in kept]
            kept = [kept[place] for place in survivors(losses, rung.survivors)]
        return [k for k in super().running(rows) if k in kept]


def best_loss(rows: Sequence[Row], step: int) -> float:
    """The lowest validation loss of a lane up to a step, nats; infinite for one that diverged."""
    seen = [row for row in rows if row["step"] <= step]
    return min(row["validation_loss"] for row in seen) if seen[-1]["alive"] else math.inf
