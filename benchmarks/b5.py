"""B5: a search and one final run against a 4x4 grid of final runs: FLOPs, tokens, wall time, and regret of the pick.

Data of two tasks are made (scripts/make_demo_data.py): the demo's own, and one whose answers shift more and pictures
less. For each task and seed, a fresh process searches with `mars probe`, `fit` and `select` as configs/demo.yaml has
it, but with grids of four ranks and shorter final runs (`FINAL_STEPS`: sixteen of the demo's are too long for two
cores), and then trains all sixteen pairs to the end. Regret is the best validation loss of the picked pair's final run
minus the grid's lowest, nats.

FLOPs are counted, not timed: the fewest that the executed steps and looks can take, padding included (costs.py). The
sequential grid, the paper's baseline, pads nothing. No search can bring more than 16, what the final run alone leaves.
The search costs the same however long final runs are, so the ratio is given for longer ones as well; those are
arithmetic, and their regret isn't measured.

Also measured, on the first seed of each task: whether nested data sizes pick the same pair as separate runs, and final
runs that start from the probe of their ranks (warm) against fresh ones, at all, 75 % and 50 % of the steps.

figure = FLOPs of the sequential grid / FLOPs of the search and the final run, over all tasks and seeds.

    python benchmarks/b5.py [--short] [--anyway] [--out FOLDER]
"""

import copy
import itertools
import math
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

from own import ROOT, Document, Warnings, answer, arguments, demo_config, publish, run_child
from results import require_quiet

if TYPE_CHECKING:
    from mars_jax.selection import Ranks
    from mars_jax.workspace import Workspace

TASKS = {
    "hue 1, German 0.4": ["--style", "hue", "--eye", "1", "--tongue", "0.4"],
    "hue 0.25, German 1": ["--style", "hue", "--eye", "0.25", "--tongue", "1"],
}
SEEDS = (0, 1, 2)
RANKS = (2, 8, 16, 32)
FINAL_STEPS = 160
LONGER = (320, 640, 1280, 2560, 5120)
WARM_SHARES = (1.0, 0.75, 0.5)
GOAL = 11.5
NESTED = ["probe.sampling=nested", "probe.num_samples=[512,1024,2048]"]

# (arguments of the data script, ranks, steps of a final run, overrides of the search, of the nested search)
Form = tuple[list[str], Sequence[int], int, list[str], list[str]]
FULL: Form = ([], RANKS, FINAL_STEPS, [], NESTED)
# Lanes this short haven't converged by the demo's rule.
_LAX = ["convergence.rule=drift", "convergence.epsilon=0.9", "convergence.sustain=1", "laws.bootstraps=20"]
SHORT: Form = (
    ["--train", "256", "--validation", "48", "--test", "16"],
    (2, 8),
    32,
    [*_LAX, "probe.corners=true", "probe.steps=16", "probe.num_samples=[64,256]", "selection.sweep.steps=16"],
    ["probe.sampling=nested", "probe.num_samples=[128,256]"],
)


def main() -> None:
    """Writes results/b5.json; about 25 minutes on two cores."""
    options = arguments(__doc__)
    if options.child:
        return answer(options.child, measure)
    load = require_quiet(options.anyway)
    sizes, ranks, steps, separate, nested = SHORT if options.short else FULL
    tasks = dict(list(TASKS.items())[: 1 if options.short else None])
    runs: list[dict[str, Any]] = []
    with TemporaryDirectory() as folder:
        for task, shift in tasks.items():
            data = Path(folder) / f"data{len(runs)}"
            script = str(ROOT / "scripts" / "make_demo_data.py")
            subprocess.run([sys.executable, script, "--out", str(data), *shift, *sizes], check=True, stdout=sys.stderr)
            for seed in SEEDS[: 1 if options.short else None]:
                spec = {
                    "folder": Path(folder) / f"run{len(runs)}",
                    "cache": Path(folder) / "cache",
                    "overrides": [*overrides(data, seed, ranks, steps), *separate],
                    "nested": nested if seed == 0 else None,
                }
                runs.append({"task": task, "seed": seed, **run_child(__file__, spec)})
                print(f"{task}, seed {seed}: {summary(runs[-1])}", file=sys.stderr)
    failed = [run for run in runs if "failed" in run]
    if len(failed) == len(runs):
        sys.exit("no search gave a valid result")
    detail = compare([run for run in runs if "failed" not in run], steps, load)
    detail["tables"]["Searches without a valid result, left out above"] = failed
    publish(
        options,
        "b5",
        detail["ratios"][str(steps)]["sequential grid"],
        "FLOPs of the sequential grid / FLOPs of search and final run",
        f"at least {GOAL}",
        detail,
    )


def overrides(data: Path, seed: int, ranks: Sequence[int], steps: int) -> list[str]:
    """Of the demo's config, for both the search and the final runs."""
    return [
        *(f"data.{name}={data / name}.json" for name in ("train", "validation", "test")),
        *(f"lora.modules.{module}.ranks={list(ranks)}" for module in ("vision", "llm")),
        f"seed={seed}",
        *final_overrides(steps),
        "finetune.warm_start=true",  # keeps the probes' adapters
    ]


def final_overrides(steps: int) -> list[str]:
    """The final run with other steps: a tenth of warm-up, as in the demo, and four looks."""
    settings = {"steps": steps, "warmup_steps": max(1, steps // 10), "look_every": max(1, steps // 4)}
    return [f"finetune.{name}={value}" for name, value in settings.items()]


def summary(run: Document) -> str:
    """One line on a task and seed."""
    if "failed" in run:
        return f"no valid result: {run['failed']}"
    pick = ", ".join(f"{module} {rank}" for module, rank in run["search"]["pick"].items())
    return f"pick {pick}, regret {regret(run):.4f} nats, search {run['search']['seconds']:.0f} s"


# In the child: one task and seed.


class Found(NamedTuple):
    """A search: its document, and where its run directory and programs are."""

    document: Document
    workspace: "Workspace"
    programs: Any
    folder: Path


def measure(folder: str, cache: str, overrides: list[str], nested: list[str] | None) -> Document:
    """Searches, runs the grid, and on demand compares nested searches and warm starts."""
    from mars_jax import compile_cache
    from mars_jax.errors import NoValidResultError

    compile_cache.enable(Path(cache))
    try:
        found = search(Path(folder) / "search", overrides)
    except NoValidResultError as error:
        return {"failed": str(error)}
    document = {"search": found.document, **full_grid(found)}
    if nested:
        try:
            other = search(Path(folder) / "nested", [*overrides, *nested], found.workspace).document
        except NoValidResultError as error:
            other = {"failed": str(error)}
        document |= {"nested": other, "final_runs": final_runs(found, Path(folder), overrides)}
    return document


def search(folder: Path, overrides: Sequence[str], known: "Workspace | None" = None) -> Found:
    """`mars probe`, `fit` and `select`; what they cost is told apart."""
    from costs import Cost, final_run, probes, sweep

    from mars_jax import pipeline
    from mars_jax.compile_cache import CompileCounter
    from mars_jax.programs import probe_programs
    from mars_jax.rundir import RunDirectory
    from mars_jax.search import planned_lanes
    from mars_jax.tuning import lane_block
    from mars_jax.workspace import Workspace

    config = demo_config(folder, overrides)
    start = time.perf_counter()
    with CompileCounter() as counter:
        for phase in (pipeline.probe, pipeline.fit, pipeline.select):
            selection = phase(config, Warnings())
    seconds = time.perf_counter() - start

    workspace = with_config(known, config) if known else Workspace(config, Warnings())
    directory = RunDirectory(folder)
    programs = probe_programs(workspace, planned_lanes(config), lane_block(workspace, directory))
    candidates = swept(workspace, directory) if selection["method"] == "local_sweep" else ()
    parts = {
        "probes": probes(workspace, programs, directory),
        "sweep": sweep(workspace, programs, candidates) if candidates else Cost(),
    }
    document = {
        "pick": selection["pick"],
        "method": selection["method"],
        "p_best": selection["p_best"],
        "fallback": selection["fallback"],
        "cost": {name: asdict(cost) for name, cost in parts.items()},
        "final_run": {str(n): asdict(final_run(workspace, programs, selection["pick"], n)) for n in lengths(config)},
        "seconds": seconds,
        "compile_seconds": counter.seconds,
    }
    return Found(document, workspace, programs, folder)


def lengths(config: Any) -> list[int]:
    """Steps of final runs to count: those of the config, and longer ones."""
    return sorted({config.finetune.steps, *LONGER})


def swept(workspace: "Workspace", directory: Any) -> tuple["Ranks", ...]:
    """The candidates of a finished search's sweep, from its laws."""
    from mars_jax import lora
    from mars_jax.jsonfiles import read_json
    from mars_jax.laws import Laws
    from mars_jax.selection import candidates_for_sweep, select

    selection = select(
        Laws.from_json(read_json(directory.laws_file)),
        workspace.grids,
        workspace.target_num_samples(),
        parameters_per_rank=lora.parameters_per_rank(workspace.targets),
    )
    return candidates_for_sweep(selection, most=workspace.config.selection.sweep.max_candidates)


def full_grid(found: Found) -> Document:
    """A final run of every pair, all as lanes of one program; and what one after the other would cost."""
    from costs import engine_grid, final_looks, grid_of, sequential_grid

    from mars_jax.compile_cache import CompileCounter
    from mars_jax.probe.leaving import Leaving, ceiling_of
    from mars_jax.probe.loop import Schedule, run_group, warmup_multipliers
    from mars_jax.probe.plan import Lane
    from mars_jax.sweep import best_loss

    workspace = found.workspace
    settings = workspace.config.finetune
    lanes = [Lane(ranks, workspace.target_num_samples(), seed=0) for ranks in grid_of(workspace.grids)]
    widest = {module: max(ranks) for module, ranks in workspace.grids.items()}
    engine = workspace.engine(widest, len(lanes), workspace.default_lane_block)
    schedule = Schedule(
        warmup_multipliers(settings.steps, settings.warmup_steps, settings.schedule),
        final_looks(workspace, settings.steps),
        looks_per_doubling=0,
        chunk_steps=workspace.config.probe.chunk_steps,
        leaving=Leaving(ceiling=ceiling_of(workspace.model_config.text.vocab_size)),
    )
    start = time.perf_counter()
    with CompileCounter() as counter:
        result = run_group(
            lanes,
            engine,
            workspace.base_on(engine.mesh),
            workspace.stream(lanes[0], settings.batch_size),
            workspace.validation_batches(settings.batch_size),
            workspace.learning_rates(settings.learning_rate),
            schedule,
            look_batches=workspace.look_batches(settings.validation_samples, settings.batch_size),
        )
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


def final_runs(found: Found, folder: Path, overrides: Sequence[str]) -> list[Document]:
    """Fresh and warm final runs of shares of the steps, with the pick or, where no probe had it, the best probe."""
    from mars_jax.compile_cache import CompileCounter
    from mars_jax.finetune import finetune
    from mars_jax.jsonfiles import read_jsonl
    from mars_jax.probe.plan import Lane
    from mars_jax.rundir import RunDirectory

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
    for share, warm in itertools.product(WARM_SHARES, (False, True)):
        steps = round(share * workspace.config.finetune.steps)
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


# In the parent: all tasks and seeds.


def compare(runs: Sequence[Document], steps: int, load: float) -> Document:
    """Sums and means over the runs, as the result shows them."""
    costs = {name: sum_costs([run["search"]["cost"][name] for run in runs]) for name in ("probes", "sweep")} | {
        "final run": sum_costs([run["search"]["final_run"][str(steps)] for run in runs])
    }
    total = sum_costs(costs.values())
    ratios = {str(n): ratios_at(runs, n) for n in sorted({steps, *LONGER})}
    nested = [run for run in runs if "nested" in run]
    return {
        "foreign_cores_busy": load,
        "final_steps": steps,
        "ceiling": len(runs[0]["grid"]),
        "ratios": ratios,
        "final_steps_for_the_goal": steps_for(GOAL, runs),
        "runs": list(runs),
        "tables": {
            "Cost, summed over tasks and seeds": [
                *(
                    {"what": name, **cost, "share of FLOPs": cost["flops"] / total["flops"]}
                    for name, cost in [*costs.items(), ("search and final run", total)]
                ),
                {"what": "same grid on our engine"} | sum_costs([run["engine_grid"]["cost"] for run in runs]),
                {"what": "sequential grid"} | sum_costs([run["sequential_grid"][str(steps)] for run in runs]),
            ],
            "FLOPs over those of search and final run, by the steps of a final run": [
                {"final steps": int(n), "regret": "measured" if int(n) == steps else "not measured", **row}
                for n, row in ratios.items()
            ],
            "Wall seconds, compiling apart": wall(runs),
            "Validation loss of the pick, nats": [losses(run) for run in runs],
            "Noise": noise(runs),
            "Separate and nested data sizes": [against_nested(run) for run in nested],
            "Final runs from a fresh draw and from the probe": [
                {"task": run["task"], **row, "ranks": words(row["ranks"])}
                for run in nested
                for row in run["final_runs"]
            ],
        },
    }


def sum_costs(costs: Any) -> dict[str, float]:
    """By field."""
    listed = list(costs)
    return {name: sum(cost[name] for cost in listed) for name in listed[0]}


def search_flops(search: Mapping[str, Any]) -> float:
    """Probes and sweep."""
    return sum(cost["flops"] for cost in search["cost"].values())


def ratios_at(runs: Sequence[Document], steps: int) -> dict[str, float]:
    """FLOPs of the baselines / FLOPs of search and final run, at some steps of a final run."""
    final = sum(run["search"]["final_run"][str(steps)]["flops"] for run in runs)
    ours = final + sum(search_flops(run["search"]) for run in runs)
    grid = sum(run["sequential_grid"][str(steps)]["flops"] for run in runs)
    return {
        "sequential grid": grid / ours,
        "four random pairs": grid / len(runs[0]["grid"]) * 4 / ours,
        "share of the search": 1 - final / ours,
    }


def steps_for(goal: float, runs: Sequence[Document]) -> float | None:
    """Steps of a final run at which the ratio reaches the goal, if it ever does: long final runs cost by the step."""
    most = max(LONGER)
    final = sum(run["search"]["final_run"][str(most)]["flops"] for run in runs) / most
    grid = sum(run["sequential_grid"][str(most)]["flops"] for run in runs) / most
    fixed = sum(search_flops(run["search"]) for run in runs)
    return fixed / (grid / goal - final) if grid / goal > final else None


def loss_of(run: Document, ranks: Mapping[str, int]) -> float:
    """Of a pair's final run."""
    return next(cell["validation_loss"] for cell in run["grid"] if cell["ranks"] == ranks)


def regret(run: Document) -> float:
    """Loss of the pick minus the grid's lowest."""
    return loss_of(run, run["search"]["pick"]) - min(cell["validation_loss"] for cell in run["grid"])


def losses(run: Document) -> Document:
    """A row on one task and seed."""
    cells = sorted(run["grid"], key=lambda cell: cell["validation_loss"])
    values = [cell["validation_loss"] for cell in cells]
    return {
        "task": run["task"],
        "seed": run["seed"],
        "pick": words(run["search"]["pick"]),
        "by": run["search"]["method"],
        "loss": loss_of(run, run["search"]["pick"]),
        "place of 16": 1 + values.index(loss_of(run, run["search"]["pick"])),
        "best pair": words(cells[0]["ranks"]),
        "its loss": values[0],
        "regret": regret(run),
        "regret of random 4": expected_best(values, min(4, len(values))) - values[0],
        "regret of one at random": statistics.fmean(values) - values[0],
    }


def against_nested(run: Document) -> Document:
    """A row on the picks of separate runs and of nested data sizes."""
    search, nested = run["search"], run["nested"]
    row = {
        "task": run["task"],
        "seed": run["seed"],
        "separate": words(search["pick"]),
        "loss": loss_of(run, search["pick"]),
    }
    if "failed" in nested:
        return row | {"nested": f"none: {nested['failed']}"}
    return row | {
        "nested": words(nested["pick"]),
        "its loss": loss_of(run, nested["pick"]),
        "same pair": search["pick"] == nested["pick"],
        "FLOPs of separate / nested": search_flops(search) / search_flops(nested),
    }


def expected_best(losses: Sequence[float], count: int) -> float:
    """The mean over all choices of `count` of the lowest loss among them."""
    choices = itertools.combinations(losses, count)
    return statistics.fmean(min(choice) for choice in choices)


def noise(runs: Sequence[Document]) -> list[Document]:
    """By task: mean regret beside the spread over seeds of one pair's loss, which no search can beat."""
    rows = []
    for task in dict.fromkeys(run["task"] for run in runs):
        seeds = [run for run in runs if run["task"] == task]
        cells = zip(*([cell["validation_loss"] for cell in run["grid"]] for run in seeds), strict=True)
        deviations = [statistics.stdev(cell) for cell in cells] if len(seeds) > 1 else []
        rows.append(
            {
                "task": task,
                "seeds": len(seeds),
                "mean regret": statistics.fmean(map(regret, seeds)),
                "standard deviation over seeds, mean of pairs": statistics.fmean(deviations) if deviations else None,
            }
        )
    return rows


def wall(runs: Sequence[Document]) -> list[Document]:
    """Means over the runs; the sequential grid is the fresh final run's time, times the pairs, so it isn't run."""
    fresh = [
        row["seconds"]
        for run in runs
        for row in run.get("final_runs", ())
        if row["start"] == "fresh" and row["steps"] == max(r["steps"] for r in run["final_runs"])
    ]
    one = statistics.fmean(fresh) if fresh else math.nan  # the first seeds' searches failed

    def mean(*path: str) -> tuple[float, float]:
        found = [run[path[0]] for run in runs]
        compiling = statistics.fmean(document["compile_seconds"] for document in found)
        return statistics.fmean(document["seconds"] for document in found) - compiling, compiling

    searching, search_compiles = mean("search")
    grid, grid_compiles = mean("engine_grid")
    pairs = len(runs[0]["grid"])
    return [
        {"what": "search, reading data included", "seconds": searching, "compiling": search_compiles},
        {"what": "one final run on our engine", "seconds": one, "compiling": None},
        {"what": "search and final run", "seconds": searching + one, "compiling": search_compiles},
        {"what": "same grid on our engine", "seconds": grid, "compiling": grid_compiles},
        {"what": f"sequential grid: {pairs} times one final run", "seconds": pairs * one, "compiling": None},
    ]


def words(ranks: Mapping[str, int]) -> str:
    """Ranks as text."""
    return " ".join(f"{module} {rank}" for module, rank in ranks.items())


if __name__ == "__main__":
    main()
