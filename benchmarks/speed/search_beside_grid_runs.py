"""One task and seed of `search_beside_grid` in a process of its own: the searches, and the grid of final runs.

The benchmark is defined, and these numbers are put together, in search_beside_grid.py.
"""

import itertools
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from benchmarks.lib.child import Document, Warnings, demo_config

if TYPE_CHECKING:
    from mars_jax.config.load import Config
    from mars_jax.job.directory import RunDirectory
    from mars_jax.job.job import Job
    from mars_jax.job.programs import Program

LENGTHS = (768, 1536, 3072, 6144, 12288)
BATCH_SIZE = 8
WARM_SHARES = (1.0, 0.75, 0.5)


def overrides(data: Path, seed: int, ranks: Sequence[int], steps: int) -> list[str]:
    """Of the demo's config, for both the search and the final runs."""
    return [
        *(f"data.{name}={data / name}.json" for name in ("train", "validation", "test")),
        *(f"lora.modules.{module}.ranks={list(ranks)}" for module in ("vision", "llm")),
        f"seed={seed}",
        *(f"{section}.batch_size={BATCH_SIZE}" for section in ("probe", "finetune")),
        *final_overrides(steps),
        "finetune.warm_start=true",  # keeps the probes' adapters
    ]


def final_overrides(steps: int) -> list[str]:
    """The final run with other steps: a tenth of warm-up, as in the demo, and four eval points."""
    settings = {"steps": steps, "warmup_steps": max(1, steps // 10), "look_every": max(1, steps // 4)}
    return [f"finetune.{name}={value}" for name, value in settings.items()]


class Found(NamedTuple):
    """A search: its document, and where its run directory and programs are."""

    document: Document
    job: "Job"
    programs: Sequence["Program"]


def measure(
    folder: str, cache: str, overrides: list[str], search: list[str], timed: list[str] | None, warm_steps: int
) -> Document:
    """Searches, runs the grid, and on demand searches the other way and compares warm starts."""
    from mars_jax.errors import NoValidResultError
    from mars_jax.runtime import compile_cache

    compile_cache.enable(Path(cache))
    try:
        found = run_search(Path(folder) / "search", [*overrides, *search])
    except NoValidResultError as error:
        return {"failed": str(error)}
    document = {"search": found.document, **full_grid(found)}
    if timed is not None:
        try:
            other = run_search(Path(folder) / "timed", [*overrides, *timed], found.job).document
        except NoValidResultError as error:
            other = {"failed": str(error)}
        finals = final_runs(found, Path(folder), [*overrides, *search], warm_steps)
        document |= {"timed": other, "final_runs": finals}
    return document


def run_search(folder: Path, overrides: Sequence[str], known: "Job | None" = None) -> Found:
    """`mars probe`, `fit` and `select`; their costs are counted apart."""
    from benchmarks.lib.costs import final_run, probes
    from mars_jax.job.directory import RunDirectory
    from mars_jax.job.job import make_job
    from mars_jax.job.programs import probe_programs
    from mars_jax.pipeline import run_pipeline
    from mars_jax.runtime.compile_cache import CompileCounter
    from mars_jax.search.probes.block_size import lane_block
    from mars_jax.search.probes.design import planned_lanes

    config = demo_config(folder, overrides)
    start = time.perf_counter()
    with CompileCounter() as counter:
        for name in ("probe", "fit", "select"):
            selection = run_pipeline(name, config, Warnings())
    seconds = time.perf_counter() - start

    directory = RunDirectory(folder)
    job = with_config(known, config, directory) if known else make_job(config, Warnings(), directory)
    programs = probe_programs(job, planned_lanes(config), lane_block(job))
    document = {
        "pick": selection["pick"],
        "method": selection["method"],
        "p_best": selection["p_best"],
        "fallback": selection["fallback"],
        "probes": asdict(probes(job, programs, directory)),
        "final_run": {str(n): asdict(final_run(job, programs, selection["pick"], n)) for n in lengths(config)},
        "seconds": seconds,
        "compile_seconds": counter.seconds,
    }
    return Found(document, job, programs)


def lengths(config: "Config") -> list[int]:
    """Steps of final runs to count: those of the config, and others."""
    return sorted({config.finetune.steps, *LENGTHS})


def full_grid(found: Found) -> Document:
    """A final run of every pair, all as lanes of one program; and what one after the other would cost."""
    from benchmarks.lib.costs import engine_grid, grid_of, sequential_grid
    from mars_jax.lanes.engine import EngineShape
    from mars_jax.lanes.eval_points import best_loss
    from mars_jax.lanes.lane import Lane
    from mars_jax.lanes.loop import run_group
    from mars_jax.runtime.compile_cache import CompileCounter
    from mars_jax.search.finals import final_schedule

    job, config = found.job, found.job.config
    settings, grids = config.finetune, config.lora.grids
    lanes = [Lane(ranks, job.data.target_num_samples(), seed=0) for ranks in grid_of(grids)]
    widest = {module: max(ranks) for module, ranks in grids.items()}
    engine = job.engines.engine(EngineShape(widest, len(lanes), job.engines.default_lane_block))
    schedule = final_schedule(config, job.base.model_config.text.vocab_size)
    start = time.perf_counter()
    with CompileCounter() as counter:
        inputs = job.inputs.final_runs(lanes[0], engine, config.learning_rates(settings.learning_rate))
        result = run_group(lanes, engine, inputs, schedule)
    seconds = time.perf_counter() - start
    vectors = [lane.ranks for lane in lanes]
    return {
        "grid": [
            {"ranks": ranks, "validation_loss": best_loss(points, settings.steps)}
            for ranks, points in zip(vectors, result.points, strict=True)
        ],
        "engine_grid": {
            "cost": asdict(engine_grid(job, engine, lanes)),
            "seconds": seconds,
            "compile_seconds": counter.seconds,
        },
        "sequential_grid": {str(steps): asdict(sequential_grid(job, vectors, steps)) for steps in lengths(config)},
    }


def final_runs(found: Found, folder: Path, overrides: Sequence[str], warm_steps: int) -> list[Document]:
    """The final run, and short fresh and warm ones, with the pick or, where no probe had it, the best probe."""
    from mars_jax.job import files
    from mars_jax.job.directory import RunDirectory
    from mars_jax.lanes.lane import Lane
    from mars_jax.lanes.stopping import Patience
    from mars_jax.runtime.compile_cache import CompileCounter
    from mars_jax.search.finals import adapters_of, final_run, write_final
    from mars_jax.search.lane_trainer import LaneTrainer
    from mars_jax.search.probes.run import recorded_probes
    from mars_jax.search.trainer import Configuration

    largest = max(found.job.config.probe.num_samples)
    probed = [
        (math.inf if record.best_loss is None else record.best_loss, dict(record.ranks))
        for record in recorded_probes(found.job)
        if record.num_samples == largest and all(record.ranks.values())
    ]
    ranks = dict(found.document["pick"])
    if Lane(ranks, largest, 0).name not in {Lane(some, largest, 0).name for _, some in probed}:
        ranks = min(probed, key=lambda probe: probe[0])[1]
    rows = []
    short = [round(share * warm_steps) for share in WARM_SHARES]
    for steps, warm in [(found.job.config.finetune.steps, False), *itertools.product(short, (False, True))]:
        place = folder / f"final{steps}{'warm' if warm else 'fresh'}"
        config = demo_config(place, [*overrides, *final_overrides(steps), f"finetune.warm_start={str(warm).lower()}"])
        with RunDirectory.open(config) as directory, CompileCounter() as counter:
            if warm:
                shutil.copytree(found.job.directory / "probes" / "adapters", place / "probes" / "adapters")
            start = time.perf_counter()
            job = with_config(found.job, config, directory)
            trainer = LaneTrainer(job, found.programs, directory / files.FINETUNE_CHECKPOINTS, "fine-tune")
            (curve,) = trainer.train([Configuration(ranks)], Patience())
            outcome = write_final(job, final_run(job, curve), adapters_of(curve), from_sweep=False)
            seconds = time.perf_counter() - start
        rows.append(
            {
                "ranks": ranks,
                "start": "probe" if warm else "fresh",
                "steps": steps,
                "best_step": outcome["best_step"],
                "validation_loss": outcome["best_validation_loss"],
                "seconds": seconds - counter.seconds,
            }
        )
    return rows


def with_config(job: "Job", config: "Config", directory: "RunDirectory") -> "Job":
    """The job with the base, data and engines that it has, under a config that differs in probes or final run only."""
    from mars_jax.job.inputs import InputsOf
    from mars_jax.job.prices import Prices

    prices, inputs = Prices(config, job.base, job.data), InputsOf(config, job.base, job.data)
    return replace(job, config=config, directory=directory, prices=prices, inputs=inputs)
