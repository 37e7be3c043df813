"""The cells of `probe_grid` and the two ways to get them: PEFT's runs, and ours with one saving after the other.

What is compared with what, and when the sides count as equal, is `probe_grid`'s business.
"""

import itertools
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from benchmarks.lib.demo_job import Seconds, demo_workspace, peft_grid, rank_vector, timed
from benchmarks.speed.peft_side import LaneResult
from mars_jax.job.prices import step_flops
from mars_jax.job.programs import Program, lane_groups, probe_programs
from mars_jax.lanes.engine import Engine
from mars_jax.lanes.lane import Lane, Ranks
from mars_jax.lanes.loop import run_group
from mars_jax.lanes.result import GroupResult, Row
from mars_jax.lanes.schedule import Schedule, look_steps, warmup_multipliers
from mars_jax.models.flops import evaluation_flops
from mars_jax.runtime.compile_cache import CompileCounter
from mars_jax.search.probes.design import plan_lanes
from mars_jax.search.probes.run import probe_schedule

LOOKS_PER_DOUBLING = 2

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
    """One side once through its cells; lane-steps and lane-looks by the lane's ranks and by those that were computed.

    Attributes:
        seconds: of the wall and of the CPU.
        curves: validation losses of each cell at its looks.
        counts: lane_steps, executed_lane_steps, lane_looks, tokens, look_tokens, flops_minimum, flops_executed.
        parts: seconds of parts, where they are known.
    """

    seconds: Seconds
    curves: Mapping[Cell, list[float]]
    counts: Mapping[str, float]
    parts: Mapping[str, float]


class Grid:
    """The cells, and both sides of them."""

    def __init__(self, form: Form) -> None:
        self.form = form
        largest = form.num_samples[-1]
        settings = [
            *(f"lora.modules.{module}.ranks={list(form.ranks)}" for module in ("vision", "llm")),
            "probe.sampling=nested",
            f"probe.looks_per_doubling={LOOKS_PER_DOUBLING}",
            "probe.corners=true",
        ]
        self.workspace = demo_workspace(*settings, f"probe.num_samples={list(form.num_samples)}")
        config = self.workspace.config
        self.lanes = [Lane(rank_vector(*pair), largest, 0) for pair in itertools.product(form.ranks, form.ranks)]
        # The gate goes on beyond the largest D; the orders of nested sizes begin alike.
        sizes = [*form.num_samples, 2 * largest]
        longer = demo_workspace(*settings, f"probe.num_samples={sizes}")
        self.stream = longer.probe_stream(replace(self.lanes[0], num_samples=sizes[-1]), cached_encoder=False)
        for step in range(sizes[-1] // config.probe.batch_size):
            _ = self.stream[step]  # encoded once: both sides find it in memory
        batch_size = config.probe.batch_size
        read = self.workspace.look_batches(config.probe.validation_samples, batch_size)
        every = self.workspace.validation_batches(batch_size)
        self.validation = {name: leaf[:read] for name, leaf in every.items()}
        self.rates = self.workspace.learning_rates()
        self.peft = peft_grid(self.workspace, "all")
        # The same mathematics with other rounding: how far float32 lets two runs agree at all.
        self.peft_rounding = peft_grid(self.workspace, "all", "eager")
        self.peft_validation = self.peft.encode_all(self.validation)
        self.tokens = [self.peft.encode(self.stream[step]).tokens for step in range(self.steps(largest))]
        self.look_tokens = sum(batch.tokens for batch in self.peft_validation)

    def steps(self, num_samples: int) -> int:
        """Steps of a single pass."""
        return num_samples // self.workspace.config.probe.batch_size

    def schedule(self, looks: Sequence[int]) -> Schedule:
        """That of a probe, with other looks; the last is the horizon."""
        warmup = self.workspace.config.optimizer.warmup_steps
        multipliers = warmup_multipliers(looks[-1], warmup, "constant")
        return replace(probe_schedule(self.workspace), looks=looks, multipliers=multipliers)

    def looks(self, num_samples: int) -> list[int]:
        """Steps of the looks at a cell."""
        return look_steps(self.steps(num_samples), LOOKS_PER_DOUBLING)

    def look_flops(self, ranks: Ranks) -> float:
        """Of one look at one lane."""
        shapes, batches = self.workspace.shapes, len(self.validation["tokens"])
        return (
            batches
            * evaluation_flops(
                self.workspace.model_config,
                self.workspace.targets,
                ranks,
                batch_size=self.workspace.config.probe.batch_size,
                tokens=shapes.max_tokens,
                tiles=shapes.max_tiles,
                supervised=shapes.max_supervised,
            ).total
        )

    # PEFT.

    def peft_lane(
        self, lane: Lane, looks: Sequence[int], *, rate_factor: float = 1.0, rounding: bool = False
    ) -> LaneResult:
        """One run of PEFT; with other rounding if asked for."""
        grid = self.peft_rounding if rounding else self.peft
        multipliers = rate_factor * self.schedule(looks).multipliers
        return grid.train_lane(lane.ranks, lane.seed, self.stream, multipliers, self.rates, looks, self.peft_validation)

    def peft_rounding_curves(self) -> dict[Cell, list[float]]:
        """Curves of all cells with other rounding, read off the runs of the largest D."""
        largest = self.form.num_samples[-1]
        rows = {lane.name: self.peft_lane(lane, self.looks(largest), rounding=True).rows for lane in self.lanes}
        return {(name, size): self._curve(rows[name], size) for name in rows for size in self.form.num_samples}

    def peft_cells(self) -> tuple[Round, dict[Cell, float]]:
        """All cells by PEFT; also the seconds of each."""
        results = {
            (lane.name, size): (lane, self.peft_lane(lane, self.looks(size)))
            for size in self.form.num_samples
            for lane in self.lanes
        }
        totals = {
            name: math.fsum(getattr(result, f"{name}_seconds") for _, result in results.values())
            for name in ("setup", "step", "look", "data", "cpu")
        }
        counts = dict.fromkeys(("lane_steps", "lane_looks", "tokens", "look_tokens", "flops_minimum"), 0.0)
        for lane, result in results.values():
            counts["lane_steps"] += len(result.losses)
            counts["lane_looks"] += len(result.rows)
            counts["tokens"] += result.tokens
            counts["look_tokens"] += result.look_tokens
            counts["flops_minimum"] += len(result.losses) * step_flops(self.workspace, lane.ranks)
            counts["flops_minimum"] += len(result.rows) * self.look_flops(lane.ranks)
        seconds = {
            cell: result.setup_seconds + result.step_seconds + result.look_seconds
            for cell, (_, result) in results.items()
        }
        curves = {cell: [row["validation_loss"] for row in result.rows] for cell, (_, result) in results.items()}
        cpu = totals.pop("cpu")
        return Round(Seconds(math.fsum(seconds.values()), cpu), curves, counts, totals), seconds

    # Ours.

    def variants(self) -> dict[str, Variant]:
        """Each saving on top of those before."""
        together = probe_programs(self.workspace, self.lanes, self.workspace.default_lane_block)
        alone = [
            replace(
                program,
                groups=lane_groups(program.bucket.lanes, 1),
                engine=self.workspace.engine(
                    program.bucket.padded_ranks,
                    1,
                    1,
                    cached_encoder=program.bucket.cached_encoder,
                    mesh=self.workspace.single_lane_mesh,
                ),
            )
            for program in together
        ]
        everyone = frozenset(lane.name for lane in self.lanes)
        design = frozenset(lane.name for lane in plan_lanes(self.workspace.grids, self.form.num_samples[-1:], 1))
        return {
            "one_lane": Variant(alone, everyone, separate=True),
            "cores": Variant(together, everyone, separate=True),
            "nested": Variant(together, everyone, separate=False),
            "cross": Variant(together, design, separate=False),
        }

    def run(
        self,
        variant: Variant,
        looks: Sequence[int],
        rate_factor: float = 1.0,
        wrap: Callable[[Engine], Engine] = lambda engine: engine,
    ) -> Iterator[tuple[Program, list[Lane], GroupResult]]:
        """Runs the variant's lanes over one schedule, group by group."""
        schedule = self.schedule(looks)
        schedule = replace(schedule, multipliers=rate_factor * schedule.multipliers)
        for program in variant.programs:
            for group in program.groups:
                if lanes := [lane for lane in group if lane.name in variant.lanes]:
                    yield (
                        program,
                        lanes,
                        run_group(
                            lanes,
                            wrap(program.engine),
                            self.workspace.base_on(program.engine.mesh),
                            self.stream,
                            self.validation,
                            self.rates,
                            schedule,
                        ),
                    )

    def our_losses(self, variant: Variant, steps: int, rate_factor: float) -> dict[str, np.ndarray]:
        """Training losses of every step of the variant's lanes, by lane."""
        chunks: list[np.ndarray] = []

        def recording(engine: Engine) -> Engine:
            def chunk(state: Any, base: Any, validation: Any, work: Any) -> Any:
                state, losses, look = engine.chunk(state, base, validation, work)
                chunks.append(np.asarray(losses)[:, : int(work.num_steps)])
                return state, losses, look

            return replace(engine, chunk=chunk)

        found: dict[str, np.ndarray] = {}
        for _, lanes, result in self.run(variant, [0, steps], rate_factor, recording):
            losses = np.concatenate(chunks, axis=1)
            chunks.clear()
            found |= {lane.name: losses[slot] for lane, slot in zip(lanes, result.slots, strict=True)}
        return found

    def our_cells(self, variant: Variant) -> Round:
        """The cells by a variant."""
        sizes = self.form.num_samples
        runs, seconds = timed(
            lambda: [
                (size, *ran)
                for size in (sizes if variant.separate else sizes[-1:])
                for ran in self.run(variant, self.looks(size))
            ]
        )
        names = ("lane_steps", "executed_lane_steps", "lane_looks", "tokens", "look_tokens")
        counts = dict.fromkeys((*names, "flops_minimum", "flops_executed"), 0.0)
        curves: dict[Cell, list[float]] = {}
        for size, program, lanes, result in runs:
            steps, padded = self.steps(size), program.bucket.padded_ranks
            self._check_whole(lanes, result, steps)
            # All lanes are alike before the first step: one of them is looked at.
            looks = [lanes[:1], *[lanes] * (len(self.looks(size)) - 1)]
            block = program.engine.lane_block
            looked = [lane for at_one_step in looks for lane in at_one_step]
            places = sum(block * math.ceil(len(at_one_step) / block) for at_one_step in looks)
            counts["lane_steps"] += result.useful_steps
            counts["executed_lane_steps"] += result.executed_steps
            counts["lane_looks"] += len(looked)
            counts["tokens"] += len(lanes) * sum(self.tokens[:steps])
            counts["look_tokens"] += len(looked) * self.look_tokens
            counts["flops_minimum"] += sum(steps * step_flops(self.workspace, lane.ranks) for lane in lanes)
            counts["flops_minimum"] += sum(self.look_flops(lane.ranks) for lane in looked)
            counts["flops_executed"] += result.executed_steps * step_flops(self.workspace, padded)
            counts["flops_executed"] += places * self.look_flops(padded)
            for lane, rows in zip(lanes, result.rows, strict=True):
                for read in (size,) if variant.separate else sizes:
                    curves[lane.name, read] = self._curve(rows, read)
        return Round(seconds, curves, counts, {})

    def _curve(self, rows: Sequence[Row], num_samples: int) -> list[float]:
        return [row["validation_loss"] for row in rows if row["step"] <= self.steps(num_samples)]

    @staticmethod
    def _check_whole(lanes: Sequence[Lane], result: GroupResult, steps: int) -> None:
        for lane, rows in zip(lanes, result.rows, strict=True):
            if rows[-1]["step"] != steps or not rows[-1]["alive"]:
                sys.exit(
                    f"probe_grid: lane {lane.name} left at step {rows[-1]['step']} of {steps} ({rows[-1]['reason']})."
                )

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
