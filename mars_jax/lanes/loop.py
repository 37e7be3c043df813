"""The host loop over a group of lanes: feeds the compiled chunk, records eval points, stops lanes, checkpoints.

The lanes of a group read the same data, so those that run are always at the same step. A lane is a pure function of
(base, ranks, seed, data) and stops by its own eval points, so a run that goes on from a checkpoint ends where an
uninterrupted one does.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np

from mars_jax.data.batches import Batch
from mars_jax.errors import ConfigError, Interrupted, NoValidResultError
from mars_jax.lanes.engine import Engine
from mars_jax.lanes.eval_points import EvalPoint
from mars_jax.lanes.feed import Call, chunk_calls, feed
from mars_jax.lanes.inputs import NO_HOOKS, Hooks, LaneInputs
from mars_jax.lanes.lane import Lane
from mars_jax.lanes.result import GroupResult, Progress
from mars_jax.lanes.schedule import Schedule
from mars_jax.lanes.state import EvalOutput, LaneState, Work
from mars_jax.lanes.stopping import divergence
from mars_jax.runtime.checkpoint import Checkpoints
from mars_jax.runtime.jsonfiles import Document
from mars_jax.runtime.sharding import lane_sharding, place, place_batches


def run_group(
    lanes: Sequence[Lane],
    engine: Engine,
    inputs: LaneInputs,
    schedule: Schedule,
    hooks: Hooks = NO_HOOKS,
    start: GroupResult | None = None,
) -> GroupResult:
    """Runs lanes together, each until it stops or to the schedule's horizon.

    Args:
        lanes: K lanes, at most `engine.num_slots`.
        engine: compiled functions; what they compile doesn't depend on the number of lanes.
        inputs: base, batches and rates.
        schedule: steps, eval points and factors.
        hooks: checkpoints, snapshots, interrupts and progress.
        start: result to go on from, in place of a fresh state or a checkpoint; used up.

    Returns:
        The eval points of every lane and the final state.

    Raises:
        ConfigError: the checkpoints are of other lanes.
        NoValidResultError: the loss before the first step is not finite.
        Interrupted: a signal asked to stop; a checkpoint was saved where there is a place for it.
    """
    slots = lane_slots(len(lanes), engine)
    validation = place_batches(inputs.validation, engine.mesh)
    state, group = _resumed(start) if start else _start(lanes, slots, engine, inputs, hooks.checkpoints)
    reported = group.lane_steps_done(schedule) if start else 0

    def report() -> int:
        done = group.lane_steps_done(schedule)
        if done > reported or group.step < 0:
            hooks.advance(group.progress(done - reported, schedule))
        return done

    reported = report()
    last_save = time.monotonic()
    calls = chunk_calls(schedule.eval_steps, schedule.chunk_steps, group.step)
    for call, batches in feed(inputs.stream, calls, schedule.chunk_steps, engine.mesh):
        active = schedule.stopping.running(group.points)
        if not active:
            break
        # At step 0 all lanes compute the same, the base: one evaluation serves them all.
        computed = active if call.stop else active[:1]
        places = [slots[k] for k in computed]
        work = chunk_work(engine, places, batches, call, schedule, inputs.num_eval_batches)
        state, chunk_losses, found = engine.chunk(state, inputs.base, validation, work)
        if not (call.evaluate and schedule.keeps_sample_losses):
            found = found._replace(row_losses=None, row_tokens=None)  # Not worth their way to the host.
        losses, output = jax.device_get((chunk_losses, found))
        group.take_steps(active, losses[places], call, work, engine)
        if call.evaluate:
            for k in active:
                group.add_point(k, output, slots[k] if call.stop else places[0], schedule.ceiling)
            if hooks.snapshots:
                vectors = np.asarray(state.average)
                for k in active:
                    hooks.snapshots.write(call.stop, k, vectors[slots[k]])
        if not call.stop:
            state = _with_first_loss(state, group.points[0][0].validation_loss, engine)
        reported = report()
        stop = hooks.interrupts.requested if hooks.interrupts else None
        due = time.monotonic() - last_save >= schedule.checkpoint_seconds
        if hooks.checkpoints and call.stop < schedule.horizon and (due or stop):
            if hooks.snapshots:
                hooks.snapshots.flush()
            by_lane = jax.tree.map(lambda leaf: np.asarray(leaf)[slots], state)
            hooks.checkpoints.save(call.stop, by_lane, {"lanes": _names(lanes), **group.to_json()})
            last_save = time.monotonic()
        if stop:
            where = f"a checkpoint of step {call.stop} was saved; " if hooks.checkpoints else ""
            raise Interrupted(f"stopped by {stop.name}: {where}run the same command again to go on")
    return GroupResult(group.points, state, slots, *group.lane_steps)


@dataclass
class _Group:
    """State of a group on the host.

    Attributes:
        step: steps done by the running lanes; -1 before the eval point at step 0.
        points: eval points of each lane.
        train_losses: of each lane, since its last eval point.
        lane_steps: useful and executed, see `GroupResult`.
    """

    step: int
    points: list[list[EvalPoint]]
    train_losses: list[list[float]]
    lane_steps: list[int]

    def to_json(self) -> Document:
        """The document of a checkpoint."""
        points = [[point.to_json() for point in of_lane] for of_lane in self.points]
        return {
            "step": self.step,
            "points": points,
            "train_losses": [list(losses) for losses in self.train_losses],
            "lane_steps": self.lane_steps,
        }

    @classmethod
    def from_json(cls, document: Document) -> "_Group":
        points = [[EvalPoint.from_json(point) for point in of_lane] for of_lane in document["points"]]
        return cls(document["step"], points, document["train_losses"], document["lane_steps"])

    def lane_steps_done(self, schedule: Schedule) -> int:
        """Steps of all lanes, those saved by stopping early included."""
        running = len(schedule.stopping.running(self.points))
        return running * max(self.step, 0) + (len(self.points) - running) * schedule.horizon

    def progress(self, lane_steps: int, schedule: Schedule) -> Progress:
        """The progress after some lane-steps more."""
        losses = [points[-1].validation_loss for points in self.points if points and points[-1].alive]
        running = len(schedule.stopping.running(self.points))
        return Progress(lane_steps, max(self.step, 0), running, min(losses, default=math.nan))

    def take_steps(self, active: list[int], losses: np.ndarray, call: Call, work: Work, engine: Engine) -> None:
        """Counts the steps of a chunk and keeps their losses [lanes, C]."""
        self.step = call.stop
        steps = call.stop - call.start
        for k, lane_losses in zip(active, losses, strict=False):
            self.train_losses[k] += map(float, lane_losses[:steps])
        room = int(work.num_blocks.sum()) * engine.lane_block
        self.lane_steps = [self.lane_steps[0] + steps * len(active), self.lane_steps[1] + steps * room]

    def add_point(self, k: int, output: EvalOutput, place: int, ceiling: float) -> None:
        """Adds an eval point to lane k, which was evaluated at `place`."""
        loss, alive = float(output.validation_loss[place]), bool(output.alive[place])
        before = self.points[k][-1].step if self.points[k] else 0
        reason = divergence(self.points[k][0].validation_loss, loss, ceiling) if self.points[k] else None
        if not alive:
            reason = f"the loss was not finite between steps {before} and {self.step}"
        train_losses, self.train_losses[k] = self.train_losses[k], []
        self.points[k].append(
            EvalPoint(
                step=self.step,
                train_loss=float(np.mean(train_losses)) if train_losses else None,
                validation_loss=loss,
                update_norm={module: float(norm[place]) for module, norm in output.update_norm.items()},
                drift={module: float(drift[place]) for module, drift in output.drift.items()},
                alive=reason is None,
                reason=reason,
                sample_losses=_sample_losses(output, place),
            )
        )


def _sample_losses(output: EvalOutput, place: int) -> tuple[float, ...]:
    """See `EvalPoint.sample_losses`; empty where they did not come to the host."""
    if output.row_losses is None or output.row_tokens is None:
        return ()
    tokens = np.asarray(output.row_tokens[place])
    samples = tokens > 0
    shares = np.asarray(output.row_losses[place])[samples] / tokens[samples].mean()
    return tuple(shares.tolist())


def _resumed(result: GroupResult) -> tuple[LaneState, _Group]:
    step = max(points[-1].step for points in result.points)
    lane_steps = [result.useful_steps, result.executed_steps]
    return result.state, _Group(step, result.points, [[] for _ in result.points], lane_steps)


def _start(
    lanes: Sequence[Lane], slots: Sequence[int], engine: Engine, inputs: LaneInputs, checkpoints: Checkpoints | None
) -> tuple[LaneState, _Group]:
    """The newest checkpoint of these lanes, or a fresh state; slots without a lane hold a copy of the last one."""
    engine.check_padding(lanes)
    by_slot = dict(zip(slots, range(len(lanes)), strict=True))
    in_slot = [by_slot.get(slot, len(lanes) - 1) for slot in range(engine.num_slots)]
    state = engine.init(
        inputs.base,
        np.asarray([inputs.seed + lanes[k].seed for k in in_slot], np.int32),
        {m: np.asarray([lanes[k].ranks[m] for k in in_slot], np.int32) for m in lanes[0].ranks},
        {m: np.asarray([inputs.rates_of(k)[m] for k in in_slot], np.float32) for m in lanes[0].ranks},
    )
    if inputs.initial:
        vectors, snapshots = np.array(state.trainable), np.array(state.snapshots)
        for slot, k in by_slot.items():
            if k in inputs.initial:
                vectors[slot] = snapshots[slot, -1] = inputs.initial[k]
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
            return place(restored, lane_sharding(engine.mesh)), _Group.from_json(document)
    return state, _Group(-1, [[] for _ in lanes], [[] for _ in lanes], [0, 0])


def _check_lanes(checkpoints: Checkpoints, document: Document, lanes: Sequence[Lane]) -> None:
    """Refuses to go on from another group's state."""
    if document["lanes"] != _names(lanes):
        raise ConfigError(
            f"the checkpoints in {checkpoints.directory} are of the lanes {', '.join(document['lanes'])}, and those to "
            f"run are {', '.join(_names(lanes))}. Delete the folder to start over, or run the same lanes."
        )


def _names(lanes: Sequence[Lane]) -> list[str]:
    return [lane.name for lane in lanes]


def _with_first_loss(state: LaneState, loss: float, engine: Engine) -> LaneState:
    """Gives every lane the validation loss of step 0, for which one of them was evaluated."""
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
    engine: Engine, slots: Sequence[int], batches: Batch, call: Call, schedule: Schedule, eval_batches: int
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
    multipliers[: call.stop - call.start] = schedule.multipliers[call.start : call.stop]
    newest_share[: call.stop - call.start] = schedule.newest_share(np.arange(call.start, call.stop) + 1)
    return Work(
        slots=lists.reshape(-1),
        num_blocks=np.asarray(engine.blocks(counts.tolist()), np.int32),
        batches=batches,
        multipliers=multipliers,
        newest_share=newest_share,
        num_steps=np.int32(call.stop - call.start),
        evaluate=np.bool_(call.evaluate),
        step=np.int32(call.stop),
        half=np.bool_(call.evaluate and schedule.has_half(call.stop)),
        eval_batches=np.int32(eval_batches),
    )
