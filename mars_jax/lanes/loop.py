"""The host loop over a group of lanes: feeds the compiled chunk, looks at the lanes, lets them leave, checkpoints.

The lanes of a group read the same data, so those that run are always at the same step. A lane is a pure function of
(base, ranks, seed, data) and leaves by what its own rows say, so a run that goes on from a checkpoint ends where an
uninterrupted one does.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax
import numpy as np

from mars_jax.data.batches import Batch
from mars_jax.errors import ConfigError, Interrupted, NoValidResultError
from mars_jax.lanes.engine import Engine
from mars_jax.lanes.feed import Piece, Stream, feed, pieces
from mars_jax.lanes.lane import Lane
from mars_jax.lanes.result import GroupResult, Progress, Rates, Row
from mars_jax.lanes.schedule import Schedule, has_half
from mars_jax.lanes.snapshots import Snapshots
from mars_jax.lanes.state import LaneState, Look, Work
from mars_jax.runtime.checkpoint import Checkpoints
from mars_jax.runtime.interrupts import Interrupts
from mars_jax.runtime.sharding import lane_sharding, place, place_batches


def run_group(
    lanes: Sequence[Lane],
    engine: Engine,
    base: Any,
    stream: Stream,
    validation: Batch,
    learning_rates: Rates | Sequence[Rates],
    schedule: Schedule,
    *,
    look_batches: int | None = None,
    checkpoints: Checkpoints | None = None,
    snapshots: Snapshots | None = None,
    start: GroupResult | None = None,
    initial: Mapping[int, np.ndarray] | None = None,
    interrupts: Interrupts | None = None,
    advance: Callable[[Progress], None] = lambda progress: None,
) -> GroupResult:
    """Runs lanes together, each until it leaves or to the schedule's horizon.

    Args:
        lanes: at most `engine.num_slots` lanes.
        engine: compiled functions; what they compile doesn't depend on the number of lanes.
        base: frozen parameters, on the engine's mesh.
        stream: the batches that every lane reads.
        validation: batches [V, B, ...] for looks.
        learning_rates: module -> learning rate, for all lanes or for each.
        schedule: steps, looks and factors.
        look_batches: how many of the validation batches a look reads, from the first; None: all.
        checkpoints: where to save and resume; None for neither.
        snapshots: where to keep the adapters of every look; None for nowhere.
        start: go on from here, in place of a fresh state or a checkpoint; used up.
        initial: lane -> adapters [P] that it starts from, if fresh, in place of its own draw.
        interrupts: looked at after every chunk.
        advance: told how it stands after every chunk.

    Returns:
        The rows of every look and the final state.

    Raises:
        ConfigError: the checkpoints are of other lanes.
        NoValidResultError: the loss before the first step is not finite.
        Interrupted: a signal asked to stop; a checkpoint was saved where there is a place for it.
    """
    slots = lane_slots(len(lanes), engine)
    look_batches = look_batches or len(jax.tree.leaves(validation)[0])
    validation = place_batches(validation, engine.mesh)
    told = 0
    if start is None:
        state, group = _start(lanes, slots, engine, learning_rates, checkpoints, initial)
    else:
        state = start.state
        rows, lane_steps = start.rows, [start.useful_steps, start.executed_steps]
        group = _Group(max(lane_rows[-1]["step"] for lane_rows in rows), rows, [[] for _ in rows], lane_steps)
        told = group.lane_steps_done(schedule)

    def tell() -> int:
        done = group.lane_steps_done(schedule)
        if done > told or group.step < 0:
            losses = [rows[-1]["validation_loss"] for rows in group.rows if rows and rows[-1]["alive"]]
            running = len(schedule.leaving.running(group.rows))
            advance(Progress(done - told, max(group.step, 0), running, min(losses, default=math.nan)))
        return done

    told = tell()
    last_save = time.monotonic()
    calls = pieces(schedule.looks, schedule.chunk_steps, group.step)
    for piece, batches in feed(stream, calls, schedule.chunk_steps, engine.mesh):
        active = schedule.leaving.running(group.rows)
        if not active:
            break
        # Where lanes start from, all compute the same: the base.
        shown = active if piece.stop else active[:1]
        places = [slots[k] for k in shown]
        work = chunk_work(engine, places, batches, piece, schedule, look_batches)
        state, *results = engine.chunk(state, base, validation, work)
        losses, seen = jax.device_get(results)
        group.take_steps(active, losses[places], piece, work, engine)
        if piece.look:
            for k in active:
                group.look(k, seen, slots[k] if piece.stop else places[0], schedule)
            if snapshots:
                vectors = np.asarray(state.average)
                for k in active:
                    snapshots.write(piece.stop, k, vectors[slots[k]])
        if not piece.stop:
            state = _with_first_loss(state, group.rows[0][0], engine)
        told = tell()
        stop = interrupts.requested if interrupts else None
        due = time.monotonic() - last_save >= schedule.checkpoint_seconds
        if checkpoints and piece.stop < schedule.horizon and (due or stop):
            if snapshots:
                snapshots.flush()
            by_lane = jax.tree.map(lambda leaf: np.asarray(leaf)[slots], state)
            checkpoints.save(piece.stop, by_lane, {"lanes": _names(lanes), **asdict(group)})
            last_save = time.monotonic()
        if stop:
            where = f"a checkpoint of step {piece.stop} was saved; " if checkpoints else ""
            raise Interrupted(f"stopped by {stop.name}: {where}run the same command again to go on")
    return GroupResult(group.rows, state, slots, *group.lane_steps)


@dataclass
class _Group:
    """Where a group is: all but the device state, in JSON types.

    Attributes:
        step: steps done by the running lanes; -1 before the look at step 0.
        rows: see `GroupResult`.
        train_losses: of each lane, since its last look.
        lane_steps: useful and executed, see `GroupResult`.
    """

    step: int
    rows: list[list[Row]]
    train_losses: list[list[float]]
    lane_steps: list[int]

    def lane_steps_done(self, schedule: Schedule) -> int:
        """Steps of all lanes, those saved by leaving included."""
        running = len(schedule.leaving.running(self.rows))
        return running * max(self.step, 0) + (len(self.rows) - running) * schedule.horizon

    def take_steps(self, active: list[int], losses: np.ndarray, piece: Piece, work: Work, engine: Engine) -> None:
        """Counts the steps of a chunk and keeps their losses [lanes, C]."""
        self.step = piece.stop
        steps = piece.stop - piece.start
        for k, lane_losses in zip(active, losses, strict=False):
            self.train_losses[k] += map(float, lane_losses[:steps])
        room = int(work.num_blocks.sum()) * engine.lane_block
        self.lane_steps = [self.lane_steps[0] + steps * len(active), self.lane_steps[1] + steps * room]

    def look(self, k: int, seen: Look, place: int, schedule: Schedule) -> None:
        """Adds the row of lane k, whose look is at `place`."""
        loss, alive = float(seen.validation_loss[place]), bool(seen.alive[place])
        before = self.rows[k][-1]["step"] if self.rows[k] else 0
        reason = schedule.leaving.divergence(self.rows[k][0]["validation_loss"], loss) if self.rows[k] else None
        if not alive:
            reason = f"the loss was not finite between steps {before} and {self.step}"
        train_losses, self.train_losses[k] = self.train_losses[k], []
        self.rows[k].append(
            {
                "step": self.step,
                "train_loss": float(np.mean(train_losses)) if train_losses else None,
                "validation_loss": loss,
                "update_norm": {module: float(norm[place]) for module, norm in seen.update_norm.items()},
                "drift": {module: float(drift[place]) for module, drift in seen.drift.items()},
                "alive": reason is None,
                "reason": reason,
            }
        )


def _start(
    lanes: Sequence[Lane],
    slots: Sequence[int],
    engine: Engine,
    learning_rates: Rates | Sequence[Rates],
    checkpoints: Checkpoints | None,
    initial: Mapping[int, np.ndarray] | None,
) -> tuple[LaneState, _Group]:
    """The newest checkpoint of these lanes, or a fresh state; slots without a lane hold a copy of the last one."""
    by_slot = dict(zip(slots, range(len(lanes)), strict=True))
    filled = [lanes[by_slot.get(slot, -1)] for slot in range(engine.num_slots)]
    of_lanes = [learning_rates] * len(lanes) if isinstance(learning_rates, Mapping) else learning_rates
    rates = [of_lanes[by_slot.get(slot, -1)] for slot in range(engine.num_slots)]
    state = engine.init(
        np.asarray([lane.seed for lane in filled], np.int32),
        {m: np.asarray([lane.ranks[m] for lane in filled], np.int32) for m in lanes[0].ranks},
        {m: np.asarray([lane_rates[m] for lane_rates in rates], np.float32) for m in lanes[0].ranks},
    )
    if initial:
        vectors, snapshots = np.array(state.trainable), np.array(state.snapshots)
        for slot, k in by_slot.items():
            if k in initial:
                vectors[slot] = snapshots[slot, -1] = initial[k]
        # A copy each: the chunk takes over every buffer that it is given.
        copies = {name: vectors.copy() for name in ("trainable", "average", "best")} | {"snapshots": snapshots}
        state = state._replace(**place(copies, lane_sharding(engine.mesh)))
    if checkpoints:
        # Saved by lane, since slots depend on the mesh.
        abstract = jax.tree.map(lambda leaf: np.empty((len(lanes), *leaf.shape[1:]), leaf.dtype), state)
        found = checkpoints.restore(abstract, lambda document: _check_lanes(checkpoints, document, lanes))
        if found:
            _, by_lane, document = found
            order = [slots.index(slot) if slot in by_slot else -1 for slot in range(engine.num_slots)]
            restored = jax.tree.map(lambda leaf: np.asarray(leaf)[order], by_lane)
            restored = place(restored, lane_sharding(engine.mesh))
            return restored, _Group(*[document[name] for name in ("step", "rows", "train_losses", "lane_steps")])
    return state, _Group(-1, [[] for _ in lanes], [[] for _ in lanes], [0, 0])


def _check_lanes(checkpoints: Checkpoints, document: Mapping[str, Any], lanes: Sequence[Lane]) -> None:
    """Refuses to go on from another group's state."""
    if document["lanes"] != _names(lanes):
        raise ConfigError(
            f"the checkpoints in {checkpoints.directory} are of the lanes {', '.join(document['lanes'])}, and those to "
            f"run are {', '.join(_names(lanes))}. Delete the folder to start over, or run the same lanes."
        )


def _names(lanes: Sequence[Lane]) -> list[str]:
    return [lane.name for lane in lanes]


def _with_first_loss(state: LaneState, row: Row, engine: Engine) -> LaneState:
    """Gives every lane the validation loss of step 0, which one of them was looked at for."""
    loss = row["validation_loss"]
    if not math.isfinite(loss):
        raise NoValidResultError(
            f"the validation loss before the first step is {loss}, so nothing can be learned from it. Check the "
            "checkpoint's weights, or use model.dtype: float32."
        )
    losses = np.full(engine.num_slots, loss, np.float32)
    return state._replace(best_loss=place(losses, lane_sharding(engine.mesh)))


def lane_slots(lanes: int, engine: Engine) -> list[int]:
    """Slots of some number of lanes, dealt out over the engine's devices."""
    if lanes > engine.num_slots:
        raise ConfigError(f"{lanes} lanes were given to an engine of {engine.num_slots} slots. Run fewer at once.")
    local = engine.num_slots // engine.lane_devices
    return [(k % engine.lane_devices) * local + k // engine.lane_devices for k in range(lanes)]


def chunk_work(
    engine: Engine, slots: Sequence[int], batches: Batch, piece: Piece, schedule: Schedule, look_batches: int
) -> Work:
    """The arguments of one call of the chunk, for the lanes in some slots."""
    devices, block = engine.lane_devices, engine.lane_block
    local = engine.num_slots // devices
    lists = np.full((devices, -(-local // block) * block), local, np.int32)
    counts = np.zeros(devices, np.int32)
    for slot in slots:
        device = slot // local
        lists[device, counts[device]] = slot % local
        counts[device] += 1
    multipliers, newest_share = np.zeros((2, schedule.chunk_steps), np.float32)
    multipliers[: piece.stop - piece.start] = schedule.multipliers[piece.start : piece.stop]
    newest_share[: piece.stop - piece.start] = schedule.newest_share(np.arange(piece.start, piece.stop) + 1)
    return Work(
        slots=lists.reshape(-1),
        num_blocks=np.asarray(engine.blocks(counts.tolist()), np.int32),
        batches=batches,
        multipliers=multipliers,
        newest_share=newest_share,
        num_steps=np.int32(piece.stop - piece.start),
        look=np.bool_(piece.look),
        step=np.int32(piece.stop),
        half=np.bool_(piece.look and has_half(schedule, piece.stop)),
        look_batches=np.int32(look_batches),
    )
