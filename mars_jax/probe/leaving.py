"""When lanes may stop before their horizon, told from their looks alone: a lane diverged, or its best lies far behind.

Pure functions of rows, so a resumed run decides as an uninterrupted one does. What the looks mean for the laws is in
`mars_jax.convergence`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
