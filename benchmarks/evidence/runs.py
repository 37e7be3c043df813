"""The lanes behind `evidence.py`: probes, every final run of the grid, and other rates, of a task and seed.

What each row means and what follows from it is in `evidence_methods.py`. Lanes are run once and kept in files.
"""

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.lib.costs import grid_of
from benchmarks.lib.trials import Rows, by_width, make_data, one_program, probe_rows, reads, task_workspace
from mars_jax.data.batches import eval_batches
from mars_jax.data.examples import ExampleSource
from mars_jax.data.shapes import plan_shapes
from mars_jax.job.workspace import Workspace
from mars_jax.lanes.lane import Lane
from mars_jax.lanes.losses import best_of, losses_of
from mars_jax.lanes.result import Rates, Row
from mars_jax.runtime.jsonfiles import read_json, write_json
from mars_jax.search.finals import final_schedule, run_finals
from mars_jax.search.probes.design import plan_lanes

SEARCHED = ("vision", "llm")
UNIFORM_RANK = 8
FACTORS = (1 / 3, 3.0)
LOOKS = 8  # of a final run, evenly spaced
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
    """A lane that ran to its end: looks as (step, validation loss), and the test loss of its best look, nats."""

    ranks: dict[str, int]
    curve: list[tuple[int, float]]
    test_loss: float

    @property
    def loss(self) -> float:
        """The lowest validation loss."""
        return min(loss for _, loss in self.curve)


class Probes(NamedTuple):
    """The probes of a search."""

    workspace: Workspace
    lanes: list[Lane]  # one for every D, also where they are read off the same run
    rows: Rows


class Cell(NamedTuple):
    """All lanes of a task and seed."""

    workspace: Workspace
    probes: dict[str, Probes]  # by sampling
    grid: list[Run]
    rates: list[tuple[dict[str, float], Run]]  # uniform ranks, with the factors on the learning rates of the modules
    retuned: list[tuple[float, Run]]  # pairs at the ends and in the middle, with the factor on all learning rates


def run_cell(folder: Path, form: Form, shift: Sequence[str], seed: int, tell: Callable[[str], None]) -> Cell:
    """Runs what isn't there yet.

    Args:
        folder: of the task; cells of its seeds have folders in it.
        form: how much is run.
        shift: arguments of scripts/make_demo_data.py.
        seed: the config's: of the choice of samples, their order and the adapters.
        tell: told what has been run, and in how many seconds.
    """
    data = make_data(folder / "data", [*shift, "--train", str(form.train), "--test", str(form.test)])
    settings = [
        f"seed={seed}",
        *(f"lora.modules.{module}.ranks={list(form.ranks)}" for module in ("vision", "llm")),
        f"finetune.steps={form.final_steps}",
        f"finetune.look_every={form.final_steps // LOOKS}",
        f"evaluate.max_samples={form.test}",
        "convergence.rule=splice",
    ]
    workspace = task_workspace(data, *settings, f"probe.num_samples={list(form.nested)}")
    place = folder / f"seed{seed}"

    def timed(name: str, work: Callable[[Path], Any]) -> Any:
        start = time.perf_counter()
        found = work(place / f"{name}.json")
        tell(f"{folder.name}, seed {seed}: {name}, {time.perf_counter() - start:.0f} s")
        return found

    # Not more than one seed of a D: seeds of the experiment are other configs.
    lanes = plan_lanes(workspace.grids, form.nested[-1:], 1, corners=True, single_module=True)
    rows = timed("nested", partial(probe_rows, workspace=workspace, lanes=lanes))
    probes = {"nested": Probes(workspace, reads(workspace, lanes), rows)}
    probes["half nested"] = first_half(probes["nested"])
    probes["quarter nested"] = first_half(probes["half nested"])
    vectors = grid_of(workspace.grids)
    grid = timed("grid", partial(final_runs, workspace=workspace, vectors=vectors))
    base = workspace.learning_rates(workspace.config.finetune.learning_rate)

    def other_rates(name: str, vectors: Sequence[dict[str, int]], factors: Sequence[dict[str, float]]) -> list[Run]:
        rates = [{module: base[module] * factor for module, factor in those.items()} for those in factors]
        return timed(name, partial(final_runs, workspace=workspace, vectors=vectors, rates=rates))

    uniform = {module: UNIFORM_RANK for module in workspace.grids}
    factors = [
        {module: factor if module == changed else 1.0 for module in workspace.grids}
        for changed in SEARCHED
        for factor in FACTORS
    ]
    rates = list(zip(factors, other_rates("rates", [uniform] * len(factors), factors), strict=True))
    retuned = []
    if seed < form.extra_seeds:
        separate = task_workspace(
            data,
            *settings,
            "probe.sampling=separate",
            f"probe.num_samples={list(form.separate)}",
            f"probe.steps={form.separate_steps}",
        )
        lanes = plan_lanes(separate.grids, form.separate, 1, corners=True, single_module=True)
        by_size = {size: [lane for lane in lanes if lane.num_samples == size] for size in form.separate}
        rows = [
            row
            for size, some in by_size.items()
            for row in timed(f"separate{size}", partial(probe_rows, workspace=separate, lanes=some))
        ]
        probes["separate"] = Probes(separate, list(itertools.chain(*by_size.values())), rows)
        ends = [min(form.ranks), max(form.ranks)]
        pairs = [uniform | dict(zip(SEARCHED, pair, strict=True)) for pair in itertools.product(ends, ends)]
        tried = [(pair, factor) for pair in [uniform, *pairs] for factor in FACTORS]
        everywhere = [dict.fromkeys(base, factor) for _, factor in tried]
        runs = other_rates("retuned", [pair for pair, _ in tried], everywhere)
        retuned = [(factor, run) for (_, factor), run in zip(tried, runs, strict=True)]
    return Cell(workspace, probes, grid, rates, retuned)


def first_half(probes: Probes) -> Probes:
    """What single passes over half of the largest D would have shown: the same lanes without their last reading."""
    largest = max(lane.num_samples for lane in probes.lanes)
    kept = [place for place, lane in enumerate(probes.lanes) if lane.num_samples < largest]
    return Probes(probes.workspace, [probes.lanes[k] for k in kept], [probes.rows[k] for k in kept])


def final_runs(
    file: Path, workspace: Workspace, vectors: Sequence[dict[str, int]], rates: Sequence[Rates] | None = None
) -> list[Run]:
    """Final runs as `mars finetune` does them, as lanes of one program, with the test loss of each one's best look."""
    if not file.exists():
        found: dict[int, dict[str, Any]] = {}
        for places in by_width(vectors, wide=lambda over: tuple(over.values())):
            some = [vectors[place] for place in places]
            their_rates = None if rates is None else [rates[place] for place in places]
            found |= zip(places, _run_group(workspace, some, their_rates), strict=True)
        write_json(file, [found[place] for place in range(len(vectors))])
    return [
        Run(run["ranks"], [(step, math.inf if loss is None else loss) for step, loss in run["curve"]], run["test_loss"])
        for run in read_json(file)
    ]


def _run_group(
    workspace: Workspace, vectors: Sequence[dict[str, int]], rates: Sequence[Rates] | None
) -> list[dict[str, Any]]:
    settings = workspace.config.finetune
    lanes = [Lane(ranks, workspace.target_num_samples(), seed=0) for ranks in vectors]
    engine = one_program(workspace, lanes).engine
    schedule = final_schedule(workspace)
    # Halving of the whole grid has its first rung there.
    schedule = replace(schedule, looks=sorted({*schedule.looks, settings.steps // EARLY}))
    rates = rates or [workspace.learning_rates(settings.learning_rate)] * len(lanes)
    result = run_finals(workspace, engine, lanes, rates, schedule=schedule)
    test = test_batches(workspace, settings.batch_size)
    losses = losses_of(
        best_of(result),
        engine,
        result.state,
        workspace.base_on(engine.mesh),
        workspace.stream(lanes[0], settings.batch_size)[0],
        test,
        chunk_steps=workspace.config.probe.chunk_steps,
        look_batches=len(test["tokens"]),
    )
    return [
        {"ranks": lane.ranks, "curve": [seen(row) for row in rows], "test_loss": loss}
        for lane, rows, loss in zip(lanes, result.rows, losses, strict=True)
    ]


def seen(row: Row) -> tuple[int, float]:
    """Step and validation loss of a look."""
    return row["step"], row["validation_loss"] if row["alive"] else math.inf


def test_batches(workspace: Workspace, batch_size: int) -> dict[str, np.ndarray]:
    """Test samples [V, B, ...] in the shapes of training batches; longer ones are left out."""
    kept = plan_shapes(workspace.test_records, workspace.preprocessor, workspace.shapes.max_tokens).kept
    source = ExampleSource(kept, workspace.preprocessor, workspace.shapes, cache_bytes=0)
    batches = [batch for batch, _ in eval_batches(source, batch_size)]
    return {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}
