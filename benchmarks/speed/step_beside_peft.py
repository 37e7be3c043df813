"""Time of one training step: PEFT's over ours, on the same CPU cores.

Both sides train the same adapter, of the demo's largest ranks, on the same batch with the same optimizer, in float32.
Ours is the program of the probe phase with a lane on each core (the figure), or with one lane, or a block of vectorised
lanes, whose products all cores share. It separates the price of a step from what `probe_grid` saves by sharing runs.

    python -m benchmarks.speed.step_beside_peft [--short] [--anyway] [--repeats N] [--out FOLDER]

Definitions. A batch is 16 samples of the demo. A round times ten steps of every side, and the order of the sides is
reversed from round to round. Ours is a call of the engine's chunk, transfers from the host included, without padding:
the lanes have the program's ranks. PEFT computes logits at all positions, as users do, or at the supervised ones only;
adding the adapter, four steps to warm up and turning the batch into tensors aren't timed.

figure = milliseconds of a PEFT step (all positions) / milliseconds of our lane-step, a lane on each core, medians.
"""

import time
from collections.abc import Callable
from typing import get_args

import numpy as np

from benchmarks.lib.child import publish
from benchmarks.lib.demo_job import (
    Conditions,
    FixedBatch,
    arguments,
    demo_job,
    peft_grid,
    rank_vector,
)
from benchmarks.lib.results import rounds, spread
from benchmarks.speed.peft_side import Head
from mars_jax.data.batches import Batch
from mars_jax.job.job import Job
from mars_jax.lanes.engine import Engine, EngineShape
from mars_jax.lanes.lane import Lane

RANK = 32
STEPS, WARM_UP = 10, 4

Side = Callable[[], float]
"""Runs STEPS steps of all its lanes; returns the seconds of a lane-step."""


def main() -> None:
    """Writes results/step_beside_peft.json; about two minutes, most of it compiling."""
    options = arguments(__doc__, repeats=9, short_repeats=3)
    with Conditions(options.anyway) as conditions:
        job = demo_job()
        lane = Lane(rank_vector(RANK, RANK), max(job.config.probe.num_samples), seed=0)
        batch = job.data.probe_stream(lane, cached_encoder=False)[0]
        cores = job.base.mesh.size
        sides: dict[str, Side] = {}
        losses: dict[str, np.ndarray] = {}
        first_use_seconds: dict[str, float] = {}
        engines = {
            f"ours_block_{n}": job.engines.engine(EngineShape(lane.ranks, n, n), job.base.single_lane_mesh)
            for n in (1, 2)
        }
        engines["ours"] = job.engines.engine(EngineShape(lane.ranks, cores, job.engines.default_lane_block))
        for name, engine in engines.items():
            sides[name], losses[name], first_use_seconds[name] = our_side(job, lane, batch, engine)
        for head in get_args(Head):
            name = f"peft_head_{head}"
            sides[name], losses[name] = peft_side(job, lane, batch, head)
        found = rounds(sides, options.repeats)

    milliseconds = {name: spread(1e3 * seconds for seconds in of_side) for name, of_side in found.items()}
    ratios = {
        f"{peft} / {ours}": {
            which: milliseconds[peft][which] / milliseconds[ours][which] for which in ("median", "minimum")
        }
        for peft in sides
        for ours in sides
        if peft.startswith("peft") and ours.startswith("ours")
    }
    reference = losses["peft_head_all"]
    publish(
        options,
        "step_beside_peft",
        ratios["peft_head_all / ours"]["median"],
        f"ms of a PEFT step / ms of our lane-step, {cores} lanes side by side, one a core",
        "above 1",
        {
            "repeats": options.repeats,
            "conditions": conditions.summary(),
            "ranks": lane.ranks,
            "batch_shapes": {name: str(leaf.shape) for name, leaf in batch.items()},
            "steps_a_round": STEPS,
            "milliseconds_of_a_lane_step": milliseconds,
            "ratios": ratios,
            "first_use_seconds": first_use_seconds,
            "largest_relative_difference_of_losses_from_peft_head_all": {
                name: float(np.max(np.abs(of_side / reference - 1.0))) for name, of_side in losses.items()
            },
        },
    )


def our_side(job: Job, lane: Lane, batch: Batch, engine: Engine) -> tuple[Side, np.ndarray, float]:
    """The side of a program whose slots hold copies of one lane; its losses; seconds its first use took longer."""
    fixed, lanes = FixedBatch(job, batch, STEPS), engine.num_slots
    state = fixed.fresh(engine, [lane])

    def side() -> float:
        nonlocal state
        start = time.perf_counter()
        state, _ = fixed.train(engine, state, lanes)
        return (time.perf_counter() - start) / (STEPS * lanes)

    start = time.perf_counter()
    state, losses = fixed.train(engine, state, lanes)
    first = time.perf_counter() - start
    return side, losses[0], first - STEPS * lanes * side()


def peft_side(job: Job, lane: Lane, batch: Batch, head: Head) -> tuple[Side, np.ndarray]:
    """The side of PEFT, and its losses."""
    grid = peft_grid(job, head)
    encoded, rates = grid.encode(batch), job.config.learning_rates()

    def side() -> float:
        repeated = grid.repeat_step(lane.ranks, lane.seed, encoded, rates, WARM_UP + STEPS)
        return sum(repeated.seconds[WARM_UP:]) / STEPS

    return side, grid.repeat_step(lane.ranks, lane.seed, encoded, rates, STEPS).losses[:, 0]


if __name__ == "__main__":
    main()
