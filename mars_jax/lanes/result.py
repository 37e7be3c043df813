"""Results of a group of lanes, and its progress on the way."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np

from mars_jax.adapters.tree import trim
from mars_jax.lanes.engine import Engine
from mars_jax.lanes.eval_points import EvalPoint
from mars_jax.lanes.lane import Lane
from mars_jax.lanes.state import LaneState
from mars_jax.runtime.trees import Tree


@dataclass(frozen=True)
class GroupResult:
    """What a group of lanes leaves.

    Attributes:
        points: eval points of each lane.
        state: the final state, leading axis N slots.
        slots: the slot of each lane.
        useful_steps: steps of lanes that were run.
        executed_steps: steps that the calls' blocks had room for.
    """

    points: list[list[EvalPoint]]
    state: LaneState
    slots: list[int]
    useful_steps: int
    executed_steps: int

    def lane_state(self, k: int) -> LaneState:
        """The state of lane k on the host, without the axis of slots."""
        return jax.tree.map(lambda leaf: np.asarray(leaf)[self.slots[k]], self.state)


def best_adapters(engine: Engine, result: GroupResult, k: int, lane: Lane) -> Tree:
    """The adapters of lane k at its lowest validation loss, unpadded."""
    state, layout = result.lane_state(k), engine.layout
    return trim(layout.adapters(state.best, state.fixed), layout.targets, lane.ranks, layout.method)


class Progress(NamedTuple):
    """State of a group after a chunk.

    Attributes:
        lane_steps: done, or saved by lanes that stopped early, since the last report; the first time, those of the
            checkpoint.
        step: steps done by the running lanes.
        running: lanes that go on.
        loss: the lowest validation loss at the last eval point, nats; NaN if there is none.
    """

    lane_steps: int
    step: int
    running: int
    loss: float

    @property
    def text(self) -> str:
        """The loss in words; nothing where there is none."""
        return "" if math.isnan(self.loss) else f"validation loss {self.loss:.3f}"
