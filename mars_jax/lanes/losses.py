"""Losses of adapters that are given, not trained: an engine's own look without steps, so nothing more is compiled."""

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any, NamedTuple

import jax
import numpy as np

from mars_jax.data.batches import Batch
from mars_jax.lanes.engine import Engine
from mars_jax.lanes.feed import Piece
from mars_jax.lanes.loop import chunk_work, lane_slots
from mars_jax.lanes.result import GroupResult
from mars_jax.lanes.schedule import Schedule
from mars_jax.lanes.state import LaneState
from mars_jax.runtime.sharding import lane_sharding, place, place_batches


class Adapters(NamedTuple):
    """A lane's adapters as an engine has them, in arrays of numpy or JAX."""

    vector: Any  # float32 [P]
    scales: Mapping[str, Any]  # float32 [], of each module in the engine's layout


def best_of(result: GroupResult) -> list[Adapters]:
    """The adapters of every lane at its lowest validation loss."""
    best, scales = jax.device_get((result.state.best, result.state.scales))
    return [Adapters(best[slot], {module: values[slot] for module, values in scales.items()}) for slot in result.slots]


def losses_of(
    adapters: Iterable[Adapters],
    engine: Engine,
    state: LaneState,
    base: Any,
    batch: Batch,
    validation: Batch,
    *,
    chunk_steps: int,
    look_batches: int,
) -> list[float]:
    """Mean loss over the supervised tokens, nats, of each of the adapters; NaN or infinite where it isn't finite.

    Args:
        adapters: taken as many at a time as the engine has slots.
        engine: compiled functions.
        state: of lanes of that engine, which is used up.
        base: frozen parameters, on the engine's mesh.
        batch: a training batch, for its shapes.
        validation: batches [V, B, ...] to read.
        chunk_steps: C of the engine's calls.
        look_batches: how many of the validation batches to read, from the first.
    """
    by_lane = lane_sharding(engine.mesh)
    validation = place_batches(validation, engine.mesh)
    repeated = jax.tree.map(lambda leaf: np.broadcast_to(leaf, (chunk_steps, *leaf.shape)), batch)
    batches = place_batches(repeated, engine.mesh)
    schedule = Schedule(np.zeros(0, np.float32), [0], looks_per_doubling=0, chunk_steps=chunk_steps)
    alive = np.ones(engine.num_slots, bool)
    remaining, losses = iter(adapters), []
    while some := list(islice(remaining, engine.num_slots)):
        slots = lane_slots(len(some), engine)
        vectors = np.zeros((engine.num_slots, engine.layout.size), np.float32)
        scales = {module: np.ones(engine.num_slots, np.float32) for module in engine.layout.modules}
        for slot, (vector, of_modules) in zip(slots, some, strict=True):
            vectors[slot] = vector
            for module, values in scales.items():
                values[slot] = of_modules[module]
        state = state._replace(**place({"average": vectors, "scales": scales, "alive": alive}, by_lane))
        work = chunk_work(engine, slots, batches, Piece(0, 0, look=True), schedule, look_batches)
        state, _, seen = engine.chunk(state, base, validation, work)
        losses += np.asarray(seen.validation_loss)[slots].tolist()
    return losses
