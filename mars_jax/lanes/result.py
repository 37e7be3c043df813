"""Results of a group of lanes."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from mars_jax.adapters import lora
from mars_jax.lanes.engine import Engine
from mars_jax.lanes.lane import Lane
from mars_jax.lanes.state import LaneState

Row = dict[str, Any]
Rates = Mapping[str, float]


@dataclass(frozen=True)
class GroupResult:
    """What a group of lanes leaves.

    Attributes:
        rows: by lane, one row a look: step, train_loss (mean since the look before; None at step 0), validation_loss,
            update_norm, drift, alive, and reason (why it isn't alive, else None).
        state: the final state, leading axis N slots.
        slots: the slot of each lane.
        useful_steps: steps of lanes that were run.
        executed_steps: steps that the calls' blocks had room for.
    """

    rows: list[list[Row]]
    state: LaneState
    slots: list[int]
    useful_steps: int
    executed_steps: int

    def lane_state(self, k: int) -> LaneState:
        """The state of lane k on the host, without the axis of slots."""
        return jax.tree.map(lambda leaf: np.asarray(leaf)[self.slots[k]], self.state)


def best_adapters(engine: Engine, result: GroupResult, k: int, lane: Lane) -> Any:
    """The adapters of lane k at its lowest validation loss, unpadded."""
    state = result.lane_state(k)
    return lora.trim(engine.layout.adapters(state.best, state.scales), engine.layout.targets, lane.ranks)


class Progress(NamedTuple):
    """How a group stands after a chunk.

    Attributes:
        lane_steps: done, or saved by lanes that left, since the last word; the first time, those of the checkpoint.
        step: steps done by the running lanes.
        running: lanes that go on.
        loss: the lowest validation loss at the last look, nats; NaN if there is none.
    """

    lane_steps: int
    step: int
    running: int
    loss: float

    @property
    def text(self) -> str:
        """The loss in words; nothing where there is none."""
        return "" if math.isnan(self.loss) else f"validation loss {self.loss:.3f}"
