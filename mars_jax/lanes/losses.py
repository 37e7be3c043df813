"""Losses of adapters that are given, not trained: an engine's own evaluation, so nothing more is compiled."""

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import NamedTuple

import jax
import numpy as np

from mars_jax.adapters.method import AnyArray
from mars_jax.adapters.vector import Fixed
from mars_jax.lanes.engine import Engine
from mars_jax.lanes.feed import Call
from mars_jax.lanes.inputs import LaneInputs
from mars_jax.lanes.loop import chunk_work, lane_slots
from mars_jax.lanes.result import GroupResult
from mars_jax.lanes.schedule import Schedule
from mars_jax.lanes.state import LaneState
from mars_jax.runtime.sharding import lane_sharding, place, place_batches


class Adapters(NamedTuple):
    """A lane's adapters as an engine has them."""

    vector: AnyArray  # float32 [P]
    fixed: Fixed  # of one lane, in arrays of numpy or JAX


def best_of(result: GroupResult) -> list[Adapters]:
    """The adapters of every lane at its lowest validation loss, on the host."""
    best, fixed = jax.device_get((result.state.best, result.state.fixed))
    return [Adapters(best[slot], fixed_of(fixed, slot)) for slot in result.slots]


def fixed_of(fixed: Fixed, slot: int) -> Fixed:
    """The untrained leaves of the lane in a slot, from those of all slots on the host."""
    of_slot: Fixed = jax.tree.map(lambda leaf: leaf[slot], fixed)
    return of_slot


def losses_of(
    adapters: Iterable[Adapters],
    engine: Engine,
    state: LaneState,
    inputs: LaneInputs,
    *,
    chunk_steps: int,
) -> list[float]:
    """Mean loss over the supervised tokens, nats, of each of the adapters; NaN or infinite where it isn't finite.

    Args:
        adapters: taken as many at a time as the engine has slots.
        engine: compiled functions.
        state: of lanes of that engine, which is used up.
        inputs: base and validation batches to read; of the training batches only the shapes matter.
        chunk_steps: C of the engine's calls.
    """
    by_lane = lane_sharding(engine.mesh)
    validation = place_batches(inputs.validation, engine.mesh)
    repeated = jax.tree.map(lambda leaf: np.broadcast_to(leaf, (chunk_steps, *leaf.shape)), inputs.stream[0])
    batches = place_batches(repeated, engine.mesh)
    schedule = Schedule(np.zeros(0, np.float32), [0], per_doubling=0, chunk_steps=chunk_steps)
    alive = np.ones(engine.num_slots, bool)
    remaining, losses = iter(adapters), []
    while some := list(islice(remaining, engine.num_slots)):
        slots = lane_slots(len(some), engine)
        vectors, fixed = jax.tree.map(lambda *lanes, slots=slots: _in_slots(lanes, slots, engine.num_slots), *some)
        state = state._replace(**place({"average": vectors, "fixed": fixed, "alive": alive}, by_lane))
        work = chunk_work(engine, slots, batches, Call(0, 0, evaluate=True), schedule, inputs.num_eval_batches)
        state, _, output = engine.chunk(state, inputs.base, validation, work)
        losses += np.asarray(output.validation_loss)[slots].tolist()
    return losses


def _in_slots(lanes: Sequence[np.ndarray], slots: Sequence[int], num_slots: int) -> np.ndarray:
    """An array of every lane in its slot, zeros in the others: [N, ...]."""
    stacked = np.stack(lanes)
    filled = np.zeros((num_slots, *stacked.shape[1:]), stacked.dtype)
    filled[slots] = stacked
    return filled
