"""B5: a search and one final run against a 4x4 grid of final runs: FLOPs, tokens, wall time, and regret of the pick.

Data of two tasks are made (scripts/make_demo_data.py): the demo's own, and one whose answers shift more and pictures
less, both of 8192 samples. For each task and seed, a fresh process searches with `mars probe`, `fit` and `select` as
configs/demo.yaml has it (probes of up to 2048 samples), but with grids of four ranks and a final run of one pass over
all samples, and then trains all sixteen pairs to the end. Regret is the best validation loss of the picked pair's final
run minus the grid's lowest, nats.

FLOPs are counted, not timed: the fewest that the executed steps and looks can take, padding included (costs.py). The
sequential grid, the paper's baseline, pads nothing. No search can bring more than 16, what the final run alone leaves.
The search costs the same however long final runs are, so the ratio is given for longer ones as well; those are
arithmetic, and their regret isn't measured.

Also measured, on the first seed of each task: whether nested data sizes pick the same pair as separate runs, and final
runs that start from the probe of their ranks (warm) against fresh ones, at all, 75 % and 50 % of the steps.

figure = FLOPs of the sequential grid / FLOPs of the search and the final run, over all tasks and seeds.

    python benchmarks/b5.py [--short] [--anyway] [--out FOLDER]
"""

import itertools
import math
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from b5_search import LONGER, measure, overrides
from own import ROOT, Document, answer, arguments, publish, run_child
from results import require_quiet

TASKS = {
    "hue 1, German 0.4": ["--style", "hue", "--eye", "1", "--tongue", "0.4"],
    "hue 0.25, German 1": ["--style", "hue", "--eye", "0.25", "--tongue", "1"],
}
SEEDS = (0,)
RANKS = (2, 8, 16, 32)
FINAL_STEPS = 512
GOAL = 11.5
NESTED = ["probe.sampling=nested", "probe.num_samples=[512,1024,2048]"]

# (arguments of the data script, ranks, steps of a final run, overrides of the search, of the nested search)
Form = tuple[list[str], Sequence[int], int, list[str], list[str]]
FULL: Form = (["--train", "8192"], RANKS, FINAL_STEPS, [], NESTED)
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
    """Writes results/b5.json; about 20 minutes on two cores."""
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


def summary(run: Document) -> str:
    """One line on a task and seed."""
    if "failed" in run:
        return f"no valid result: {run['failed']}"
    pick = ", ".join(f"{module} {rank}" for module, rank in run["search"]["pick"].items())
    return f"pick {pick}, regret {regret(run):.4f} nats, search {run['search']['seconds']:.0f} s"


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
            "Separate and nested data sizes": [against_nested(run, steps) for run in nested],
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


def against_nested(run: Document, steps: int) -> Document:
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
        "sequential grid / nested search and final run": ratios_at([run | {"search": nested}], steps)[
            "sequential grid"
        ],
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
