"""The host loop over a group of lanes: feeds the compiled chunk, looks at the lanes, checkpoints, resumes.

Everything between two looks happens in one compiled program; this file decides only what it is fed. A lane is a pure
function of (base, ranks, seed, data), so a run that goes on from a checkpoint ends where an uninterrupted one does.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from mars_jax.checkpoint import Checkpoints
from mars_jax.data.batches import Batch
from mars_jax.errors import ConfigError
from mars_jax.probe.engine import Engine, LaneState
from mars_jax.probe.plan import Lane

Row = dict[str, Any]


class Stream(Protocol):
    """Batches as a function of the step."""

    def __getitem__(self, step: int) -> Batch:
        """The batch of a step, numpy arrays [B, ...]."""
        ...


@dataclass(frozen=True)
class Schedule:
    """What all lanes of a group share over time.

    Attributes:
        multipliers: factor on the learning rates at each step, [steps].
        looks: steps at which lanes are looked at, rising; the last is the horizon.
        looks_per_doubling: n when the looks are log-spaced, so that drift can be told; 0 otherwise.
        chunk_steps: most steps whose batches are held in memory at once.
        checkpoint_seconds: least time between two checkpoints.
    """

    multipliers: np.ndarray
    looks: Sequence[int]
    looks_per_doubling: int
    chunk_steps: int
    checkpoint_seconds: float = 10.0


@dataclass(frozen=True)
class GroupResult:
    """What a group of lanes leaves.

    Attributes:
        rows: by lane, one row a look: step, train_loss (mean since the look before; None at step 0), validation_loss,
            update_norm, drift, alive.
        state: the final state, leading axis K.
    """

    rows: list[list[Row]]
    state: LaneState


def warmup_multipliers(steps: int, warmup_steps: int, shape: str) -> np.ndarray:
    """Factors on the learning rate, float32 [steps]: linear warm-up, then "constant", "linear" or "cosine" to zero."""
    step = np.arange(1, steps + 1)
    rise = np.minimum(1.0, step / max(1, warmup_steps))
    part = np.clip((step - warmup_steps) / max(1, steps - warmup_steps), 0.0, 1.0)
    fall = {"constant": np.ones(steps), "linear": 1.0 - part, "cosine": 0.5 * (1.0 + np.cos(math.pi * part))}[shape]
    return (rise * fall).astype(np.float32)


def run_group(
    lanes: Sequence[Lane],
    engine: Engine,
    base: Any,
    stream_of: Callable[[Lane], Stream],
    validation: Batch,
    learning_rates: Mapping[str, float],
    schedule: Schedule,
    *,
    checkpoints: Checkpoints | None = None,
    start: GroupResult | None = None,
    advance: Callable[[int, str], None] = lambda steps, text: None,
) -> GroupResult:
    """Runs lanes together to the schedule's horizon.

    Args:
        lanes: K lanes; those with equal (num_samples, seed) share a stream.
        engine: compiled functions; K, the number of streams and the shapes decide what is compiled.
        base: frozen parameters.
        stream_of: lane -> its batches.
        validation: batches [V, B, ...] that every look reads.
        learning_rates: module -> learning rate.
        schedule: steps, looks and factors.
        checkpoints: where to save and resume; None for neither.
        start: go on from here, in place of a fresh state or a checkpoint; used up.
        advance: told of the lane-steps done since the last call (the first time, of those in the checkpoint), and of
            the latest look.

    Returns:
        The rows of every look and the final state.

    Raises:
        ConfigError: the checkpoints are of other lanes.
    """
    keys = [(lane.num_samples, lane.seed) for lane in lanes]
    first_of = {key: lane for key, lane in reversed(list(zip(keys, lanes, strict=True)))}
    streams = [stream_of(first_of[key]) for key in first_of]
    stream_index = jnp.asarray([list(first_of).index(key) for key in keys])
    on_device = jax.device_put(validation)

    if start is None:
        state, rows, done = _start(lanes, engine, learning_rates, checkpoints)
        advance(max(done, 0) * len(lanes), "")
    else:
        state, rows, done = start.state, start.rows, start.rows[0][-1]["step"]
    looks = [step for step in schedule.looks if step > done]
    done = max(done, 0)
    losses: list[jax.Array] = []
    last_save = time.monotonic()
    for look in looks:
        while done < look:
            size = min(schedule.chunk_steps, look - done)
            state, chunk_losses = engine.train(
                state,
                base,
                _stack(streams, range(done, done + size), schedule.chunk_steps),
                stream_index,
                jnp.asarray(np.resize(schedule.multipliers[done : done + size], schedule.chunk_steps)),
                jnp.asarray(size, jnp.int32),
            )
            losses.append(chunk_losses[:, :size])
            done += size
        half = _has_half(schedule, look)
        state, seen = engine.look(state, base, on_device, jnp.asarray(look, jnp.int32), jnp.asarray(half))
        train_losses = np.concatenate([np.zeros((len(lanes), 0)), *jax.device_get(losses)], axis=1)
        seen = jax.device_get(seen)
        for k, lane_rows in enumerate(rows):
            lane_rows.append(
                {
                    "step": look,
                    "train_loss": float(train_losses[k].mean()) if losses else None,
                    "validation_loss": float(seen.validation_loss[k]),
                    "update_norm": {module: float(norm[k]) for module, norm in seen.update_norm.items()},
                    "drift": {module: float(drift[k]) for module, drift in seen.drift.items()},
                    "alive": bool(seen.alive[k]),
                }
            )
        best = min((rows_k[-1]["validation_loss"] for rows_k in rows if rows_k[-1]["alive"]), default=math.nan)
        advance(train_losses.shape[1] * len(lanes), f"validation loss {best:.3f}")
        losses = []
        if checkpoints and look != schedule.looks[-1] and time.monotonic() - last_save > schedule.checkpoint_seconds:
            checkpoints.save(look, state, {"lanes": _names(lanes), "rows": rows})
            last_save = time.monotonic()
    return GroupResult(rows, state)


def _start(
    lanes: Sequence[Lane], engine: Engine, learning_rates: Mapping[str, float], checkpoints: Checkpoints | None
) -> tuple[LaneState, list[list[Row]], int]:
    """A fresh state, or the newest checkpoint of these lanes: (state, rows, last look); -1 before any look."""
    if checkpoints:
        _check_lanes(checkpoints, lanes)
    modules = lanes[0].ranks.keys()
    state = engine.init(
        jnp.asarray([lane.seed for lane in lanes], jnp.int32),
        {module: jnp.asarray([lane.ranks[module] for lane in lanes], jnp.int32) for module in modules},
        {module: jnp.full(len(lanes), learning_rates[module], jnp.float32) for module in modules},
    )
    # Bound to its devices, as a restored state is: both run in the same compiled program.
    state = jax.device_put(state, jax.tree.map(lambda leaf: leaf.sharding, state))
    found = checkpoints.restore(state) if checkpoints else None
    if found is None:
        return state, [[] for _ in lanes], -1
    step, restored, document = found
    return restored, document["rows"], step


def _check_lanes(checkpoints: Checkpoints, lanes: Sequence[Lane]) -> None:
    """Refuses to go on from another group's state."""
    document = checkpoints.document()
    if document and document["lanes"] != _names(lanes):
        raise ConfigError(
            f"the checkpoints in {checkpoints.directory} are of the lanes {', '.join(document['lanes'])}, and those to "
            f"run are {', '.join(_names(lanes))}. Delete the folder to start over, or run the same lanes."
        )


def _names(lanes: Sequence[Lane]) -> list[str]:
    return [lane.name for lane in lanes]


def _has_half(schedule: Schedule, look: int) -> bool:
    """Whether the look `looks_per_doubling` places before is at half the step, to rounding."""
    place = list(schedule.looks).index(look) - schedule.looks_per_doubling
    return bool(schedule.looks_per_doubling) and place >= 0 and abs(2 * schedule.looks[place] - look) <= 1.5


def _stack(streams: Sequence[Stream], steps: range, length: int) -> Batch:
    """Batches [length, S, B, ...]; rows past `steps` repeat the last one and are never read."""
    rows = [[stream[step] for stream in streams] for step in steps]
    rows += [rows[-1]] * (length - len(rows))
    shape = (length, len(streams))
    flat = [batch for row in rows for batch in row]
    return jax.tree.map(lambda *leaves: np.stack(leaves).reshape(*shape, *leaves[0].shape), *flat)
