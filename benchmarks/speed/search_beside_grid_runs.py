"""One task and seed of `search_beside_grid` in a process of its own: searches, the grid of final runs.

The definition of the benchmark, and what becomes of these numbers, is in search_beside_grid.py.
"""

import copy
import itertools
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.lib.child import Document, Warnings, demo_config

if TYPE_CHECKING:
    from mars_jax.job.workspace import Workspace

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
    """The final run with other steps: a tenth of warm-up, as in the demo, and four looks."""
    settings = {"steps": steps, "warmup_steps": max(1, steps // 10), "look_every": max(1, steps // 4)}
    return [f"finetune.{name}={value}" for name, value in settings.items()]


class Found(NamedTuple):
    """A search: its document, and where its run directory and programs are."""

    document: Document
    workspace: "Workspace"
    programs: Any
    folder: Path


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
            other = run_search(Path(folder) / "timed", [*overrides, *timed], found.workspace).document
        except NoValidResultError as error:
            other = {"failed": str(error)}
        finals = final_runs(found, Path(folder), [*overrides, *search], warm_steps)
        document |= {"timed": other, "final_runs": finals}
    return document


def run_search(folder: Path, overrides: Sequence[str], known: "Workspace | None" = None) -> Found:
    """`mars probe`, `fit` and `select`; what they cost is told apart."""
    from benchmarks.lib.costs import final_run, probes
    from mars_jax import pipeline
    from mars_jax.job.directory import RunDirectory
    from mars_jax.job.programs import probe_programs
    from mars_jax.job.workspace import Workspace
    from mars_jax.runtime.compile_cache import CompileCounter
    from mars_jax.search.probes.block_size import lane_block
    from mars_jax.search.probes.design import planned_lanes

    config = demo_config(folder, overrides)
    start = time.perf_counter()
    with CompileCounter() as counter:
        for phase in (pipeline.probe, pipeline.fit, pipeline.select):
            selection = phase(config, Warnings())
    seconds = time.perf_counter() - start

    workspace = with_config(known, config) if known else Workspace(config, Warnings())
    directory = RunDirectory(folder)
    programs = probe_programs(workspace, planned_lanes(config), lane_block(workspace, directory))
    document = {
        "pick": selection["pick"],
        "method": selection["method"],
        "p_best": selection["p_best"],
        "fallback": selection["fallback"],
        "probes": asdict(probes(workspace, programs, directory)),
        "final_run": {str(n): asdict(final_run(workspace, programs, selection["pick"], n)) for n in lengths(config)},
        "seconds": seconds,
        "compile_seconds": counter.seconds,
    }
    return Found(document, workspace, programs, folder)


def lengths(config: Any) -> list[int]:
    """Steps of final runs to count: those of the config, and others."""
    return sorted({config.finetune.steps, *LENGTHS})


def full_grid(found: Found) -> Document:
    """A final run of every pair, all as lanes of one program; and what one after the other would cost."""
    from benchmarks.lib.costs import engine_grid, grid_of, sequential_grid
    from mars_jax.lanes.lane import Lane
    from mars_jax.lanes.stopping import best_loss
    from mars_jax.runtime.compile_cache import CompileCounter
    from mars_jax.search.finals import run_finals

    workspace = found.workspace
    settings = workspace.config.finetune
    lanes = [Lane(ranks, workspace.target_num_samples(), seed=0) for ranks in grid_of(workspace.grids)]
    widest = {module: max(ranks) for module, ranks in workspace.grids.items()}
    engine = workspace.engine(widest, len(lanes), workspace.default_lane_block)
    start = time.perf_counter()
    with CompileCounter() as counter:
        result = run_finals(workspace, engine, lanes, workspace.learning_rates(settings.learning_rate))
    seconds = time.perf_counter() - start
    vectors = [lane.ranks for lane in lanes]
    return {
        "grid": [
            {"ranks": ranks, "validation_loss": best_loss(rows, settings.steps)}
            for ranks, rows in zip(vectors, result.rows, strict=True)
        ],
        "engine_grid": {
            "cost": asdict(engine_grid(workspace, engine, lanes)),
            "seconds": seconds,
            "compile_seconds": counter.seconds,
        },
        "sequential_grid": {
            str(steps): asdict(sequential_grid(workspace, vectors, steps)) for steps in lengths(workspace.config)
        },
    }


def final_runs(found: Found, folder: Path, overrides: Sequence[str], warm_steps: int) -> list[Document]:
    """The final run, and short fresh and warm ones, with the pick or, where no probe had it, the best probe."""
    from mars_jax.job.directory import RunDirectory
    from mars_jax.lanes.lane import Lane
    from mars_jax.runtime.compile_cache import CompileCounter
    from mars_jax.runtime.jsonfiles import read_jsonl
    from mars_jax.search.finals import finetune

    workspace, largest = found.workspace, max(found.workspace.config.probe.num_samples)
    probed = [
        (record["best_loss"], record["ranks"])
        for record in read_jsonl(RunDirectory(found.folder).lanes_file, workspace.reporter.warn)
        if record["num_samples"] == largest and all(record["ranks"].values())
    ]
    ranks = dict(found.document["pick"])
    if Lane(ranks, largest, 0).name not in {Lane(some, largest, 0).name for _, some in probed}:
        ranks = min(probed, key=lambda probe: probe[0])[1]
    rows = []
    short = [round(share * warm_steps) for share in WARM_SHARES]
    for steps, warm in [(workspace.config.finetune.steps, False), *itertools.product(short, (False, True))]:
        place = folder / f"final{steps}{'warm' if warm else 'fresh'}"
        config = demo_config(place, [*overrides, *final_overrides(steps), f"finetune.warm_start={str(warm).lower()}"])
        with RunDirectory.open(config) as directory, CompileCounter() as counter:
            if warm:
                shutil.copytree(found.folder / "probes" / "adapters", place / "probes" / "adapters")
            start = time.perf_counter()
            outcome = finetune(with_config(workspace, config), found.programs, ranks, directory)
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


def with_config(workspace: "Workspace", config: Any) -> "Workspace":
    """The workspace with what it has loaded, under a config that differs in probes or final run only."""
    other = copy.copy(workspace)
    other.config = config
    return other
