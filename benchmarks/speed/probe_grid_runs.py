"""The cells of `probe_grid` and the two ways to get them: PEFT's runs, and ours with one saving after the other.

What is compared with what, and when the sides count as equal, is decided in probe_grid.py.
"""

import itertools
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jax import Array

from benchmarks.lib.demo_job import demo_job, peft_grid, rank_vector
from benchmarks.lib.results import Seconds, timed
from benchmarks.speed.peft_side import LaneData, LaneResult
from mars_jax.adapters.method import AnyArray
from mars_jax.job.programs import Program, lane_groups, probe_programs
from mars_jax.lanes.engine import Engine, EngineShape
from mars_jax.lanes.eval_points import Points
from mars_jax.lanes.inputs import LaneInputs
from mars_jax.lanes.lane import Lane, Ranks
from mars_jax.lanes.loop import run_group
from mars_jax.lanes.result import GroupResult
from mars_jax.lanes.schedule import Schedule, eval_steps, warmup_multipliers
from mars_jax.lanes.state import EvalOutput, LaneState, Work
from mars_jax.runtime.compile_cache import CompileCounter
from mars_jax.runtime.trees import Tree
from mars_jax.search.probes.design import plan_lanes, probed_vectors
from mars_jax.search.probes.run import probe_schedule

PER_DOUBLING = 2  # eval points
_PARTS = {"setup": "setup", "step": "step", "look": "eval", "data": "data", "cpu": "cpu"}  # in results, and ours

Cell = tuple[str, int]
"""A lane's name and D."""


@dataclass(frozen=True)
class Form:
    """What is run: ranks of both searched modules, D, steps of the gate, and rounds of the slow variants."""

    ranks: tuple[int, ...]
    num_samples: tuple[int, ...]
    gate_steps: int
    slow_rounds: int


@dataclass(frozen=True)
class Variant:
    """A way of ours to get the cells: programs, names of the lanes to run, and whether every D is a run of its own."""

    programs: Sequence[Program]
    lanes: frozenset[str]
    separate: bool


@dataclass(frozen=True)
class Round:
    """One side once through its cells; lane-steps and eval points by the lane's ranks and by those that were computed.

    Attributes:
        seconds: of the wall and of the CPU.
        curves: validation losses of each cell at its eval points.
        counts: lane_steps, executed_lane_steps, lane_looks (eval points of lanes), tokens, look_tokens (of eval
            points), flops_minimum, flops_executed.
        parts: seconds of parts, where they are known.
    """

    seconds: Seconds
    curves: Mapping[Cell, list[float]]
    counts: Mapping[str, float]
    parts: Mapping[str, float]


class Grid:
    """The cells, and what both sides read for them."""

    def __init__(self, form: Form) -> None:
        self.form = form
        largest = form.num_samples[-1]
        settings = [
            *(f"lora.modules.{module}.ranks={list(form.ranks)}" for module in ("vision", "llm")),
            "probe.sampling=nested",
            f"probe.looks_per_doubling={PER_DOUBLING}",
            "probe.corners=true",
        ]
        self.job = demo_job(*settings, f"probe.num_samples={list(form.num_samples)}")
        probe = self.job.config.probe
        self.lanes = [Lane(rank_vector(*pair), largest, 0) for pair in itertools.product(form.ranks, form.ranks)]
        # The gate goes on beyond the largest D; the orders of nested sizes begin alike.
        sizes = [*form.num_samples, 2 * largest]
        longer = demo_job(*settings, f"probe.num_samples={sizes}")
        self.stream = longer.data.probe_stream(replace(self.lanes[0], num_samples=sizes[-1]), cached_encoder=False)
        for step in range(sizes[-1] // probe.batch_size):
            _ = self.stream[step]  # encoded once: both sides find it in memory
        read = self.job.data.num_eval_batches(probe.validation_samples, probe.batch_size)
        every = self.job.data.validation_batches(probe.batch_size)
        self.validation = {name: leaf[:read] for name, leaf in every.items()}
        self.rates = self.job.config.learning_rates()

    def steps(self, num_samples: int) -> int:
        """Steps of a single pass."""
        return num_samples // self.job.config.probe.batch_size

    def schedule(self, steps: Sequence[int]) -> Schedule:
        """That of a probe, with other eval points; the last is the horizon."""
        multipliers = warmup_multipliers(steps[-1], self.job.config.optimizer.warmup_steps, "constant")
        schedule = probe_schedule(self.job.config, self.job.base.model_config.text.vocab_size)
        return replace(schedule, eval_steps=steps, multipliers=multipliers)

    def eval_steps(self, num_samples: int) -> list[int]:
        """Eval points of a cell."""
        return eval_steps(self.steps(num_samples), PER_DOUBLING)

    def eval_flops(self, ranks: Ranks) -> float:
        """Of one eval point of one lane."""
        return self.job.prices.eval_point(ranks, self.job.config.probe.validation_samples)


class PeftSide:
    """The cells by PEFT."""

    def __init__(self, grid: Grid) -> None:
        """Of a grid."""
        self._grid = grid
        self._peft = peft_grid(grid.job, "all")
        # The same mathematics with other rounding: how far float32 lets two runs agree at all.
        self._rounding = peft_grid(grid.job, "all", "eager")
        self._validation = self._peft.encode_all(grid.validation)
        steps = grid.steps(grid.form.num_samples[-1])
        self.tokens = [self._peft.encode(grid.stream[step]).tokens for step in range(steps)]
        self.eval_tokens = sum(batch.tokens for batch in self._validation)

    def lane(self, lane: Lane, steps: Sequence[int], *, rate_factor: float = 1.0, rounding: bool = False) -> LaneResult:
        """One run with some eval points; with other rounding if asked for."""
        grid, side = self._grid, self._rounding if rounding else self._peft
        multipliers = rate_factor * grid.schedule(steps).multipliers
        data = LaneData(grid.stream, self._validation, multipliers, grid.rates, steps)
        return side.train_lane(lane.ranks, lane.seed, data)

    def rounding_curves(self) -> dict[Cell, list[float]]:
        """Curves of all cells with other rounding, read off the runs of the largest D."""
        sizes, steps = self._grid.form.num_samples, self._grid.eval_steps(self._grid.form.num_samples[-1])
        rows = {lane.name: self.lane(lane, steps, rounding=True).rows for lane in self._grid.lanes}
        return {
            (name, size): [row["validation_loss"] for row in rows[name] if row["step"] <= self._grid.steps(size)]
            for name in rows
            for size in sizes
        }

    def cells(self) -> tuple[Round, dict[Cell, float]]:
        """All cells; also the seconds of each."""
        grid = self._grid
        results = {
            (lane.name, size): (lane, self.lane(lane, grid.eval_steps(size)))
            for size in grid.form.num_samples
            for lane in grid.lanes
        }
        totals = {
            name: math.fsum(getattr(result, f"{part}_seconds") for _, result in results.values())
            for name, part in _PARTS.items()
        }
        counts = dict.fromkeys(("lane_steps", "lane_looks", "tokens", "look_tokens", "flops_minimum"), 0.0)
        for lane, result in results.values():
            counts["lane_steps"] += len(result.losses)
            counts["lane_looks"] += len(result.rows)
            counts["tokens"] += result.tokens
            counts["look_tokens"] += result.eval_tokens
            counts["flops_minimum"] += len(result.losses) * grid.job.prices.step(lane.ranks)
            counts["flops_minimum"] += len(result.rows) * grid.eval_flops(lane.ranks)
        seconds = {
            cell: result.setup_seconds + result.step_seconds + result.eval_seconds
            for cell, (_, result) in results.items()
        }
        curves = {cell: [row["validation_loss"] for row in result.rows] for cell, (_, result) in results.items()}
        cpu = totals.pop("cpu")
        return Round(Seconds(math.fsum(seconds.values()), cpu), curves, counts, totals), seconds


class OurSide:
    """The cells by our engines."""

    def __init__(self, grid: Grid, tokens: Sequence[int], eval_tokens: int) -> None:
        """Of a grid, with the tokens of each step and of an eval point, padding not counted."""
        self._grid, self._tokens, self._eval_tokens = grid, tokens, eval_tokens

    def variants(self) -> dict[str, Variant]:
        """Each saving on top of those before."""
        grid, job = self._grid, self._grid.job
        together = probe_programs(job, grid.lanes, job.engines.default_lane_block)
        alone = [
            replace(
                program,
                groups=lane_groups(program.bucket.lanes, 1),
                engine=job.engines.engine(
                    EngineShape(program.bucket.padded_ranks, 1, 1, cached_encoder=program.bucket.cached_encoder),
                    job.base.single_lane_mesh,
                ),
            )
            for program in together
        ]
        everyone = frozenset(lane.name for lane in grid.lanes)
        vectors = probed_vectors(job.config.lora.grids)
        design = frozenset(lane.name for lane in plan_lanes(vectors, grid.form.num_samples[-1:], 1))
        return {
            "one_lane": Variant(alone, everyone, separate=True),
            "cores": Variant(together, everyone, separate=True),
            "nested": Variant(together, everyone, separate=False),
            "cross": Variant(together, design, separate=False),
        }

    def run(
        self,
        variant: Variant,
        steps: Sequence[int],
        rate_factor: float = 1.0,
        wrap: Callable[[Engine], Engine] = lambda engine: engine,
    ) -> Iterator[tuple[Program, list[Lane], GroupResult]]:
        """Runs the variant's lanes over one schedule with some eval points, group by group."""
        grid = self._grid
        schedule = grid.schedule(steps)
        schedule = replace(schedule, multipliers=rate_factor * schedule.multipliers)
        for program in variant.programs:
            base = grid.job.base.params_on(program.engine.mesh)
            inputs = LaneInputs(base, grid.stream, grid.validation, grid.rates)
            for group in program.groups:
                if lanes := [lane for lane in group if lane.name in variant.lanes]:
                    yield program, lanes, run_group(lanes, wrap(program.engine), inputs, schedule)

    def losses(self, variant: Variant, steps: int, rate_factor: float) -> dict[str, np.ndarray]:
        """Training losses of every step of the variant's lanes, by lane."""
        chunks: list[np.ndarray] = []

        def recording(engine: Engine) -> Engine:
            def chunk(
                state: LaneState, base: Tree, validation: Mapping[str, AnyArray], work: Work
            ) -> tuple[LaneState, Array, EvalOutput]:
                state, losses, output = engine.chunk(state, base, validation, work)
                chunks.append(np.asarray(losses)[:, : int(work.num_steps)])
                return state, losses, output

            return replace(engine, chunk=chunk)

        found: dict[str, np.ndarray] = {}
        for _, lanes, result in self.run(variant, [0, steps], rate_factor, recording):
            losses = np.concatenate(chunks, axis=1)
            chunks.clear()
            found |= {lane.name: losses[slot] for lane, slot in zip(lanes, result.slots, strict=True)}
        return found

    def cells(self, variant: Variant) -> Round:
        """The cells by a variant."""
        grid, prices, sizes = self._grid, self._grid.job.prices, self._grid.form.num_samples
        runs, seconds = timed(
            lambda: [
                (size, *ran)
                for size in (sizes if variant.separate else sizes[-1:])
                for ran in self.run(variant, grid.eval_steps(size))
            ]
        )
        names = ("lane_steps", "executed_lane_steps", "lane_looks", "tokens", "look_tokens")
        counts = dict.fromkeys((*names, "flops_minimum", "flops_executed"), 0.0)
        curves: dict[Cell, list[float]] = {}
        for size, program, lanes, result in runs:
            steps, padded = grid.steps(size), program.bucket.padded_ranks
            _check_whole(lanes, result, steps)
            # All lanes are alike before the first step: one of them is evaluated.
            evaluated = [lanes[:1], *[lanes] * (len(grid.eval_steps(size)) - 1)]
            block = program.engine.lane_block
            listed = [lane for at_one_step in evaluated for lane in at_one_step]
            places = sum(block * math.ceil(len(at_one_step) / block) for at_one_step in evaluated)
            counts["lane_steps"] += result.useful_steps
            counts["executed_lane_steps"] += result.executed_steps
            counts["lane_looks"] += len(listed)
            counts["tokens"] += len(lanes) * sum(self._tokens[:steps])
            counts["look_tokens"] += len(listed) * self._eval_tokens
            counts["flops_minimum"] += sum(steps * prices.step(lane.ranks) for lane in lanes)
            counts["flops_minimum"] += sum(grid.eval_flops(lane.ranks) for lane in listed)
            counts["flops_executed"] += result.executed_steps * prices.step(padded)
            counts["flops_executed"] += places * grid.eval_flops(padded)
            for lane, points in zip(lanes, result.points, strict=True):
                for read in (size,) if variant.separate else sizes:
                    curves[lane.name, read] = _losses_until(points, grid.steps(read))
        return Round(seconds, curves, counts, {})

    def first_use(self, variant: Variant) -> dict[str, Any]:
        """What the first call of a variant's programs takes beyond a second call: tracing, lowering, compiling."""
        one = replace(variant, programs=[replace(p, groups=(p.groups[0][:1],)) for p in variant.programs])
        with CompileCounter() as counter:
            _, first = timed(lambda: list(self.run(one, [0, 1])))
        _, second = timed(lambda: list(self.run(one, [0, 1])))
        return {
            "wall_seconds": first.wall - second.wall,
            "cpu_seconds": first.cpu - second.cpu,
            "of_it_compiling_seconds": counter.seconds,
            "programs": counter.programs,
        }


def _losses_until(points: Points, step: int) -> list[float]:
    return [point.validation_loss for point in points if point.step <= step]


def _check_whole(lanes: Sequence[Lane], result: GroupResult, steps: int) -> None:
    for lane, points in zip(lanes, result.points, strict=True):
        if points[-1].step != steps or not points[-1].alive:
            at = f"step {points[-1].step} of {steps} ({points[-1].reason})"
            sys.exit(f"probe_grid: lane {lane.name} stopped at {at}.")
