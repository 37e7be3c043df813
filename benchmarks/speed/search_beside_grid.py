"""Compute of training every pair of ranks to the end, over that of a search and one final run.

Training every pair is the sure way to the best one, and the paper's baseline. On each task `mars probe`, `fit` and
`select` pick a pair; then all pairs are trained, so its regret is known: the validation loss of its final run minus the
lowest of all, in nats. Compute is FLOPs of the executed steps and eval points, padding included. The longer final runs
are, the less the search weighs; for other lengths than the trained one the ratio is arithmetic, and regret isn't known.

    python -m benchmarks.speed.search_beside_grid [--short] [--anyway] [--out FOLDER] [--work FOLDER]

`--work` keeps what was measured of each task and seed, so a stopped run goes on with the next.

Definitions. Data of two tasks are made (scripts/make_demo_data.py): the demo's own, and one whose pictures stay and
whose answers are all shifted, both of 32,768 samples. A fresh process searches grids of four ranks with one pass over
640 samples, in which every lane adapts all modules, 8 samples a step, and takes the laws' pick without final runs of
others; the rest is configs/demo.yaml. Then all sixteen pairs are trained for 6144 steps, one and a half passes.

FLOPs are the fewest that the executed steps and eval points can take (benchmarks/lib/costs.py). The sequential grid
pads nothing. A search for nothing and a final run of average cost would give 16; one of small ranks costs less, so it
gives more. A short final run takes the probes' program, padded to the largest ranks; a long one is worth a program of
its own, which is the jump in the table.

Also measured, on the first seed of each task: a search that times modules in lanes of their own and runs each data size
separately, 80 steps over 256 and over 2048 samples; and final runs of 512 steps that start from the probe of their
ranks (warm) against fresh ones, also with 75 % and 50 % of the steps.

figure = FLOPs of the sequential grid / FLOPs of the search and the final run, over all tasks and seeds.
"""

import itertools
import math
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from benchmarks.lib.child import ROOT, SEPARATE, Document, answer, argument_parser, publish, run_child
from benchmarks.lib.results import require_quiet
from benchmarks.speed.search_beside_grid_runs import LENGTHS, measure, overrides
from mars_jax.runtime.jsonfiles import read_json, write_json

TASKS = {
    "hue 1, German 0.4": ["--style", "hue", "--eye", "1", "--tongue", "0.4"],
    "German 1": ["--style", "hue", "--eye", "0", "--tongue", "1"],
}
SEEDS = (0,)
GOAL = 11.5
LOSS_ALONE = ["convergence.rule=null", "selection.method=laws"]
TIMED = [*SEPARATE, "convergence.rule=loss_fraction"]


class Form(NamedTuple):
    """How much is run."""

    data: list[str]  # arguments of the data script
    ranks: Sequence[int]
    steps: int  # of a final run
    warm_steps: int  # of the runs that compare warm with fresh ones
    search: list[str]  # overrides
    timed: list[str]  # overrides of the search that times modules


FULL = Form(
    ["--train", "32768"],
    (2, 8, 16, 32),
    6144,
    512,
    [*LOSS_ALONE, "probe.num_samples=[160,320,640]"],
    TIMED,
)
_SHORT = ["laws.bootstraps=20", "probe.corners=true"]
SHORT = Form(
    ["--train", "256", "--validation", "48", "--test", "16"],
    (2, 8),
    64,
    32,
    [*_SHORT, *LOSS_ALONE, "probe.num_samples=[128,256]"],
    [*_SHORT, *TIMED, "probe.steps=16", "probe.num_samples=[64,256]"],
)


def main() -> None:
    """Writes results/search_beside_grid.json; about an hour and a half on two cores."""
    parser = argument_parser(__doc__)
    parser.add_argument("--work", type=Path, help="folder that keeps what was measured")
    options = parser.parse_args()
    if options.child:
        return answer(options.child, measure)
    load = require_quiet(options.anyway)
    form = SHORT if options.short else FULL
    tasks = dict(list(TASKS.items())[: 1 if options.short else None])
    runs: list[dict[str, Any]] = []
    with TemporaryDirectory() as folder:
        for task, shift in tasks.items():
            data = Path(folder) / f"data{len(runs)}"
            script = str(ROOT / "scripts" / "make_demo_data.py")
            subprocess.run(
                [sys.executable, script, "--out", str(data), *shift, *form.data], check=True, stdout=sys.stderr
            )
            for seed in SEEDS[: 1 if options.short else None]:
                spec = {
                    "folder": Path(folder) / f"run{len(runs)}",
                    "cache": Path(folder) / "cache",
                    "overrides": overrides(data, seed, form.ranks, form.steps),
                    "search": form.search,
                    "timed": form.timed if seed == 0 else None,
                    "warm_steps": form.warm_steps,
                }
                kept = options.work and options.work / f"{len(runs)}.json"
                if kept and kept.exists():
                    runs.append(read_json(kept))
                    continue
                runs.append({"task": task, "seed": seed, **run_child(__file__, spec)})
                if kept:
                    write_json(kept, runs[-1])
                print(f"{task}, seed {seed}: {summary(runs[-1])}", file=sys.stderr)
    failed = [run for run in runs if "failed" in run]
    if len(failed) == len(runs):
        sys.exit("no search gave a valid result")
    steps = form.steps
    detail = compare([run for run in runs if "failed" not in run], steps, load)
    detail["tables"]["Searches without a valid result, left out above"] = failed
    publish(
        options,
        "search_beside_grid",
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
    costs = {
        "probes": sum_costs([run["search"]["probes"] for run in runs]),
        "final run": sum_costs([run["search"]["final_run"][str(steps)] for run in runs]),
    }
    total = sum_costs(costs.values())
    ratios = {str(n): ratios_at(runs, n) for n in sorted({steps, *LENGTHS})}
    timed = [run for run in runs if "timed" in run]
    return {
        "foreign_cores_busy": load,
        "final_steps": steps,
        "ceiling": len(runs[0]["grid"]),
        "ratios": ratios,
        "final_steps_for_the_goal": next((int(n) for n, row in ratios.items() if row["sequential grid"] >= GOAL), None),
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
            "Nested sizes and loss alone, or separate runs and lanes that time modules": [
                against_timed(run, steps) for run in timed
            ],
            "Final runs from a fresh draw and from the probe": [
                {"task": run["task"], **row, "ranks": words(row["ranks"])} for run in timed for row in run["final_runs"]
            ],
        },
    }


def sum_costs(costs: Any) -> dict[str, float]:
    """By field."""
    listed = list(costs)
    return {name: sum(cost[name] for cost in listed) for name in listed[0]}


def ratios_at(runs: Sequence[Document], steps: int) -> dict[str, float]:
    """FLOPs of the baselines / FLOPs of search and final run, at some steps of a final run."""
    final = sum(run["search"]["final_run"][str(steps)]["flops"] for run in runs)
    ours = final + sum(run["search"]["probes"]["flops"] for run in runs)
    grid = sum(run["sequential_grid"][str(steps)]["flops"] for run in runs)
    return {
        "sequential grid": grid / ours,
        "four random pairs": grid / len(runs[0]["grid"]) * 4 / ours,
        "share of the search": 1 - final / ours,
    }


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


def against_timed(run: Document, steps: int) -> Document:
    """A row on the picks of the two searches."""
    search, timed = run["search"], run["timed"]
    row = {
        "task": run["task"],
        "seed": run["seed"],
        "nested, loss alone": words(search["pick"]),
        "loss": loss_of(run, search["pick"]),
    }
    if "failed" in timed:
        return row | {"separate, timed": f"none: {timed['failed']}"}
    return row | {
        "separate, timed": words(timed["pick"]),
        "its loss": loss_of(run, timed["pick"]),
        "same pair": search["pick"] == timed["pick"],
        "balance": "not known" if timed["fallback"] else "known",
        "its FLOPs / those of the other": timed["probes"]["flops"] / search["probes"]["flops"],
        "sequential grid / it and final run": ratios_at([run | {"search": timed}], steps)["sequential grid"],
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
    """Means over the runs; the sequential grid is the final run's time, times the pairs, so it isn't run."""
    fresh = [row["seconds"] for run in runs for row in run.get("final_runs", ())[:1]]
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
