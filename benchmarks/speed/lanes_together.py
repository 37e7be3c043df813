"""Time of a training step: lanes in turn over the same lanes side by side, one on each CPU core.

These are the ways to train many adapters of one frozen base: lanes in turn, each by calls of its own; all in one call
as one vectorised block, one after the other, or with a lane on each core, as the probe phase does (the figure); and
PEFT and torch.func's vmap. Even a few tokens keep a core busy, so vectorising is not expected to gain on a CPU.

    python -m benchmarks.speed.lanes_together [--short] [--anyway] [--repeats N] [--out FOLDER]

Definitions. Lanes of the demo at its largest ranks train on one batch of 2 or 16 samples of 43 tokens, in float32 on
two threads; a time is that of a lane-step. Lanes differ in nothing that matters for time, and compiling isn't timed.
  sequential   each lane by calls of its own to a program of one lane: the yardstick
  vmap         the K lanes in one block of K, vectorised, whose products the cores share
  loop         the K lanes in one call, in blocks of one, whose products the cores share
  cores        the K lanes in one call, one a core at a time: what the probe phase does
  torch_vmap   torch.func's vmap of grad over stacked adapters (K up to 4), logits at all positions
  peft_loop    PEFT, one lane after the other, logits at all positions; its batch is cut to its longest sample
`sequential` and `peft_loop` are the same for any number of lanes, and stand at the most and at one. Those of our rows
that are slower than `sequential` are listed as losses.

figure = sequential / cores, seconds of a lane-step at most lanes and the demo's batch, medians.
"""

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

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
from benchmarks.speed.peft_vmapped import repeat_step_vmapped
from mars_jax.job.job import Job
from mars_jax.lanes.engine import Engine, EngineShape
from mars_jax.lanes.lane import Lane

RANK = 32
STEPS, WARM_UP = 4, 2

T = TypeVar("T")

Side = Callable[[], float]
"""Runs a few steps of all its lanes; returns the seconds of a lane-step."""


@dataclass(frozen=True)
class Form:
    """What is run: numbers of lanes and of samples, the last of each being the figure's, and torch's most lanes."""

    lanes: tuple[int, ...]
    batch_sizes: tuple[int, ...]
    torch_lanes: int


FULL = Form(lanes=(1, 2, 4, 8), batch_sizes=(2, 16), torch_lanes=4)
SHORT = Form(lanes=(1, 2), batch_sizes=(2,), torch_lanes=2)


def main() -> None:
    """Writes results/lanes_together.json; about ten minutes, most of it compiling."""
    options = arguments(__doc__, repeats=5, short_repeats=3)
    form = SHORT if options.short else FULL
    loads = {}
    with Conditions(options.anyway) as conditions:
        for batch_size in form.batch_sizes:
            job = demo_job(f"probe.batch_size={batch_size}")
            loads[batch_size] = measure(job, form, options.repeats)
    largest = form.lanes[-1]
    losses = [
        f"{row} of {lanes} lanes, batch {batch_size}: {ratio:.2f}"
        for batch_size, load in loads.items()
        for lanes, ratios in load["sequential_over"].items()
        for row, ratio in ratios.items()
        if ratio < 1.0 and row in ("vmap", "loop", "cores")
    ]
    publish(
        options,
        "lanes_together",
        loads[form.batch_sizes[-1]]["sequential_over"][largest]["cores"],
        f"s of a lane-step, {largest} lanes in turn / s of it side by side, a lane on each core",
        "at least 1: lanes together are never slower",
        {
            "repeats": options.repeats,
            "conditions": conditions.summary(),
            "ranks": rank_vector(RANK, RANK),
            "steps_a_round": STEPS,
            "by_batch_size": loads,
            "slower_than_sequential": losses,
        },
    )


def measure(job: Job, form: Form, repeats: int) -> dict[str, Any]:
    """All rows at one batch size."""
    ranks, most, default = rank_vector(RANK, RANK), form.lanes[-1], job.engines.default_lane_block
    lanes = [Lane(ranks, max(job.config.probe.num_samples), seed) for seed in range(most)]
    batch = job.data.probe_stream(lanes[0], cached_encoder=False)[0]
    fixed = FixedBatch(job, batch, STEPS)
    one_device = job.base.single_lane_mesh
    engines = {
        block: job.engines.engine(EngineShape(ranks, most, block), one_device) for block in sorted({1, *form.lanes})
    }
    tuned = job.engines.engine(EngineShape(ranks, most, default))
    alone = job.engines.engine(EngineShape(ranks, 1, 1), one_device)
    sides: dict[tuple[str, int], Side] = {("sequential", most): sequential(fixed, alone, lanes)}
    for count in form.lanes:
        if count > 1:
            sides["vmap", count] = together(fixed, engines[count], lanes[:count])
            sides["loop", count] = together(fixed, engines[1], lanes[:count])
        if count >= job.base.mesh.size:
            sides["cores", count] = together(fixed, tuned, lanes[:count])

    grid = peft_grid(job, "all")
    encoded, rates = grid.encode(batch), job.config.learning_rates()

    def peft_loop() -> float:
        seconds = grid.repeat_step(ranks, 0, encoded, rates, WARM_UP + STEPS).seconds
        return sum(seconds[WARM_UP:]) / STEPS

    sides["peft_loop", 1] = peft_loop
    for count in (count for count in form.lanes if count <= form.torch_lanes):
        vmapped = [(ranks, seed) for seed in range(count)]

        def torch_vmap(vmapped: list[tuple[dict[str, int], int]] = vmapped) -> float:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch says where vmap loops
                seconds = repeat_step_vmapped(grid, vmapped, encoded, rates, WARM_UP + STEPS).seconds
            return sum(seconds[WARM_UP:]) / (STEPS * len(vmapped))

        sides["torch_vmap", count] = torch_vmap

    for side in sides.values():
        side()  # compiles
    found = {key: spread(1e3 * seconds for seconds in of_side) for key, of_side in rounds(sides, repeats).items()}
    yardstick = found["sequential", most]["median"]
    return {
        "tokens_of_a_lane_step": batch["tokens"].size,
        "tokens_without_padding": encoded.tokens,
        "flops_of_a_lane_step": job.prices.step(ranks),
        "default_block": default,
        "milliseconds_of_a_lane_step": by_lanes(found),
        "sequential_over": by_lanes({key: yardstick / times["median"] for key, times in found.items()}),
    }


def sequential(fixed: FixedBatch, engine: Engine, lanes: Sequence[Lane]) -> Side:
    """Lanes in turn, each by a call of its own."""
    states = [fixed.fresh(engine, [lane]) for lane in lanes]

    def side() -> float:
        start = time.perf_counter()
        for k, state in enumerate(states):
            states[k], _ = fixed.train(engine, state, 1)
        return (time.perf_counter() - start) / (STEPS * len(lanes))

    return side


def together(fixed: FixedBatch, engine: Engine, lanes: Sequence[Lane]) -> Side:
    """Lanes in one call."""
    state = fixed.fresh(engine, lanes)

    def side() -> float:
        nonlocal state
        start = time.perf_counter()
        state, _ = fixed.train(engine, state, len(lanes))
        return (time.perf_counter() - start) / (STEPS * len(lanes))

    return side


def by_lanes(of_sides: Mapping[tuple[str, int], T]) -> dict[int, dict[str, T]]:
    """Number of lanes -> row -> what there is of it."""
    counts = sorted({count for _, count in of_sides})
    return {lanes: {row: value for (row, count), value in of_sides.items() if count == lanes} for lanes in counts}


if __name__ == "__main__":
    main()
