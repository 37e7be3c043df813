"""The lanes behind `evidence`: probes, every final run of the grid, and other rates, of a task and seed.

What each curve means and what follows from it is in methods.py. Lanes are run once and kept in files.
"""

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from benchmarks.lib.costs import grid_of
from benchmarks.lib.trials import Curves, by_width, make_data, one_engine, probe_curves, read_lanes, task_job
from mars_jax.data.batches import Batch, eval_batches
from mars_jax.data.examples import ExampleSource
from mars_jax.data.shapes import plan_shapes
from mars_jax.job.job import Job
from mars_jax.lanes.eval_points import EvalPoint
from mars_jax.lanes.inputs import Rates
from mars_jax.lanes.lane import Lane, Ranks
from mars_jax.lanes.loop import run_group
from mars_jax.lanes.losses import best_of, losses_of
from mars_jax.runtime.jsonfiles import Document, read_json, write_json
from mars_jax.search.finals import final_schedule
from mars_jax.search.probes.design import plan_lanes, probed_vectors
from mars_jax.search.trainer import Configuration, Curve

T = TypeVar("T")

SEARCHED = ("vision", "llm")
UNIFORM_RANK = 8
FACTORS = (1 / 3, 3.0)
EVAL_POINTS = 8  # of a final run, evenly spaced
EARLY = 16  # and one more after this part of it


class Form(NamedTuple):
    """How much is run in a cell."""

    ranks: Sequence[int]
    nested: Sequence[int]  # D of the probes that are single passes
    separate: Sequence[int]  # D of the probes that repeat their data
    separate_steps: int
    train: int  # samples of a final run
    final_steps: int
    test: int
    extra_seeds: int  # seeds that also have separate probes and final runs at other rates


FULL = Form((2, 4, 8, 16, 32), (320, 640, 1280), (128, 512), 160, 5120, 320, 256, 1)
SHORT = Form((2, 8, 16), (64, 128, 256), (32, 64), 32, 512, 32, 32, 1)


class Run(NamedTuple):
    """A lane that ran to its end: eval points as (step, validation loss), the test loss of its best one, nats."""

    ranks: dict[str, int]
    curve: list[tuple[int, float]]
    test_loss: float

    @property
    def loss(self) -> float:
        """The lowest validation loss."""
        return min(loss for _, loss in self.curve)

    def recorded(self, factors: Mapping[str, float]) -> Curve:
        """The run as a trainer replays it, with the factors on the learning rates of its modules."""
        changed = {module: factor for module, factor in factors.items() if factor != 1.0}
        points = tuple(EvalPoint(step, loss, alive=math.isfinite(loss)) for step, loss in self.curve)
        return Curve(Configuration(self.ranks, changed), points)


class Probes(NamedTuple):
    """The probes of a search."""

    job: Job
    lanes: list[Lane]  # one for every D, also where they are read off the same run
    curves: Curves


class Cell(NamedTuple):
    """All lanes of a task and seed."""

    job: Job
    probes: dict[str, Probes]  # by sampling
    grid: list[Run]
    rates: list[tuple[dict[str, float], Run]]  # uniform ranks, with the factors on the learning rates of the modules
    retuned: list[tuple[float, Run]]  # pairs at the ends and in the middle, with the factor on all learning rates


def run_cell(folder: Path, form: Form, shift: Sequence[str], seed: int, report: Callable[[str], None]) -> Cell:
    """Runs what isn't there yet.

    Args:
        folder: of the task; cells of its seeds have folders in it.
        form: how much is run.
        shift: arguments of scripts/make_demo_data.py.
        seed: the config's: of the choice of samples, their order and the adapters.
        report: gets a line on what has been run, and in how many seconds.
    """
    data = make_data(folder / "data", [*shift, "--train", str(form.train), "--test", str(form.test)])
    settings = [
        f"seed={seed}",
        *(f"lora.modules.{module}.ranks={list(form.ranks)}" for module in ("vision", "llm")),
        f"finetune.steps={form.final_steps}",
        f"finetune.look_every={form.final_steps // EVAL_POINTS}",
        f"evaluate.max_samples={form.test}",
        "convergence.rule=splice",
    ]
    job = task_job(data, *settings, f"probe.num_samples={list(form.nested)}")
    place = folder / f"seed{seed}"

    def timed(name: str, work: Callable[[Path], T]) -> T:
        start = time.perf_counter()
        found = work(place / f"{name}.json")
        report(f"{folder.name}, seed {seed}: {name}, {time.perf_counter() - start:.0f} s")
        return found

    # Not more than one seed of a D: seeds of the experiment are other configs.
    grids = job.config.lora.grids
    probed = probed_vectors(grids, corners=True, single_module=True)
    lanes = plan_lanes(probed, form.nested[-1:], 1)
    curves = timed("nested", partial(probe_curves, job=job, lanes=lanes))
    probes = {"nested": Probes(job, read_lanes(job.config, lanes), curves)}
    probes["half nested"] = first_half(probes["nested"])
    probes["quarter nested"] = first_half(probes["half nested"])
    vectors = grid_of(grids)
    grid = timed("grid", partial(final_runs, job=job, vectors=vectors))
    base = job.config.learning_rates(job.config.finetune.learning_rate)

    def other_rates(name: str, vectors: Sequence[dict[str, int]], factors: Sequence[dict[str, float]]) -> list[Run]:
        rates = [{module: base[module] * factor for module, factor in those.items()} for those in factors]
        return timed(name, partial(final_runs, job=job, vectors=vectors, rates=rates))

    uniform = {module: UNIFORM_RANK for module in grids}
    factors = [
        {module: factor if module == changed else 1.0 for module in grids} for changed in SEARCHED for factor in FACTORS
    ]
    rates = list(zip(factors, other_rates("rates", [uniform] * len(factors), factors), strict=True))
    retuned: list[tuple[float, Run]] = []
    if seed < form.extra_seeds:
        separate = task_job(
            data,
            *settings,
            "probe.sampling=separate",
            f"probe.num_samples={list(form.separate)}",
            f"probe.steps={form.separate_steps}",
        )
        lanes = plan_lanes(probed, form.separate, 1)
        by_size = {size: [lane for lane in lanes if lane.num_samples == size] for size in form.separate}
        curves = [
            points
            for size, some in by_size.items()
            for points in timed(f"separate{size}", partial(probe_curves, job=separate, lanes=some))
        ]
        probes["separate"] = Probes(separate, list(itertools.chain(*by_size.values())), curves)
        ends = [min(form.ranks), max(form.ranks)]
        pairs = [uniform | dict(zip(SEARCHED, pair, strict=True)) for pair in itertools.product(ends, ends)]
        tried = [(pair, factor) for pair in [uniform, *pairs] for factor in FACTORS]
        everywhere = [dict.fromkeys(base, factor) for _, factor in tried]
        runs = other_rates("retuned", [pair for pair, _ in tried], everywhere)
        retuned = [(factor, run) for (_, factor), run in zip(tried, runs, strict=True)]
    return Cell(job, probes, grid, rates, retuned)


def first_half(probes: Probes) -> Probes:
    """What single passes over half of the largest D would have shown: the same lanes without their largest D."""
    largest = max(lane.num_samples for lane in probes.lanes)
    kept = [place for place, lane in enumerate(probes.lanes) if lane.num_samples < largest]
    return Probes(probes.job, [probes.lanes[k] for k in kept], [probes.curves[k] for k in kept])


def final_runs(
    file: Path, job: Job, vectors: Sequence[dict[str, int]], rates: Sequence[Rates] | None = None
) -> list[Run]:
    """Final runs as `mars finetune` does them, as lanes of one program, with the test loss at each one's best."""
    if not file.exists():
        found: dict[int, Document] = {}
        for places in by_width(vectors, wide=lambda over: tuple(over.values())):
            some = [vectors[place] for place in places]
            their_rates = None if rates is None else [rates[place] for place in places]
            found |= zip(places, _run_group(job, some, their_rates), strict=True)
        write_json(file, [found[place] for place in range(len(vectors))])
    return [
        Run(run["ranks"], [(step, math.inf if loss is None else loss) for step, loss in run["curve"]], run["test_loss"])
        for run in read_json(file)
    ]


def _run_group(job: Job, vectors: Sequence[Ranks], rates: Sequence[Rates] | None) -> list[Document]:
    settings = job.config.finetune
    lanes = [Lane(ranks, job.data.target_num_samples(), seed=0) for ranks in vectors]
    engine = one_engine(job, lanes)
    schedule = final_schedule(job.config, job.base.model_config.text.vocab_size)
    # Halving of the whole grid has its first rung there.
    schedule = replace(schedule, eval_steps=sorted({*schedule.eval_steps, settings.steps // EARLY}))
    inputs = job.inputs.final_runs(lanes[0], engine, rates or job.config.learning_rates(settings.learning_rate))
    result = run_group(lanes, engine, inputs, schedule)
    losses = losses_of(
        best_of(result),
        engine,
        result.state,
        replace(inputs, validation=test_batches(job, settings.batch_size), eval_batches=None),
        chunk_steps=job.config.probe.chunk_steps,
    )
    return [
        {"ranks": lane.ranks, "curve": [step_and_loss(point) for point in points], "test_loss": loss}
        for lane, points, loss in zip(lanes, result.points, losses, strict=True)
    ]


def step_and_loss(point: EvalPoint) -> tuple[int, float]:
    """Of an eval point; the loss is infinite where the lane diverged."""
    return point.step, point.validation_loss if point.alive else math.inf


def test_batches(job: Job, batch_size: int) -> Batch:
    """Test samples [V, B, ...] in the shapes of training batches; longer ones are left out."""
    data = job.data
    kept = plan_shapes(data.test_records, data.preprocessor, data.shapes.max_tokens).kept
    source = ExampleSource(kept, data.preprocessor, data.shapes, cache_bytes=0)
    batches = [batch for batch, _ in eval_batches(source, batch_size)]
    return {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}
