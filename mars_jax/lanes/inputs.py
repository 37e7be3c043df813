"""Inputs of a group of lanes, gathered once: base, training and validation batches, learning rates."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from mars_jax.data.batches import Batch
from mars_jax.lanes.feed import Stream
from mars_jax.lanes.result import Progress
from mars_jax.lanes.snapshots import Snapshots
from mars_jax.runtime.checkpoint import Checkpoints
from mars_jax.runtime.interrupts import Interrupts
from mars_jax.runtime.trees import Tree

Rates = Mapping[str, float]
"""Module -> learning rate."""


@dataclass(frozen=True)
class LaneInputs:
    """What the lanes of a group read.

    Attributes:
        base: frozen parameters, on the engine's mesh.
        stream: the training batches that every lane reads.
        validation: validation batches [V, B, ...].
        rates: learning rates, for all lanes or for each.
        eval_batches: how many of the validation batches an eval point reads, from the first; None: all.
        initial: lane -> adapters [P] that it starts from in place of its own draw.
        seed: added to the seed of each lane for the draw of its adapters.
    """

    base: Tree
    stream: Stream
    validation: Batch
    rates: Rates | Sequence[Rates]
    eval_batches: int | None = None
    initial: Mapping[int, np.ndarray] | None = None
    seed: int = 0

    @property
    def num_eval_batches(self) -> int:
        """Validation batches that an eval point reads."""
        return self.eval_batches or len(jax.tree.leaves(self.validation)[0])

    def rates_of(self, k: int) -> Rates:
        """Learning rates of lane k."""
        return self.rates if isinstance(self.rates, Mapping) else self.rates[k]


@dataclass(frozen=True)
class Hooks:
    """What goes on beside training.

    Attributes:
        checkpoints: where to save and resume; None for neither.
        snapshots: where to keep the adapters of every eval point; None for nowhere.
        interrupts: asked after every chunk whether to stop.
        advance: called with the progress after every chunk.
    """

    checkpoints: Checkpoints | None = None
    snapshots: Snapshots | None = None
    interrupts: Interrupts | None = None
    advance: Callable[[Progress], None] = lambda progress: None


NO_HOOKS = Hooks()
