"""Does the pick win? Regret of MARS' picks and of the alternatives against the whole grid, on three tasks.

Tasks shift easy-VQA for the demo's base: "eye" negates pictures and puts three of thirteen answers into German,
"tongue" keeps pictures and puts all answers into German, "both" rotates hues and puts five into German. (With negated
pictures and no new answer the spread of a grid was that of its noise: ranks don't matter there.) For each task and seed
every pair of five ranks is trained to the end (320 steps of 16, one pass over 5120 samples, cosine): the oracle.
Regret is the validation loss of a method's final run over the grid's lowest, minus one; test regret the same of test
losses, each run being read at its best validation look. Probes are one pass over 1280 samples at a constant rate, read
at 320, 640 and 1280, so the laws are extrapolated by 4 in D. All methods see validation losses only.

Runs of one pair differ between seeds, so the lowest of 25 losses is partly luck, which no method can pick. "Expected"
regret is of losses that are means over the seeds of a task.

Compute is counted in final runs, the winner's own included. "sweep" is successive halving over the final runs' own
curves. TPE is optuna's, with asynchronous successive halving, replayed on the recorded curves (mean of 20 replays);
random search is the exact expectation. The definitions are in evidence_methods.py, the lanes in evidence_runs.py.

figure = share of cells (task x seed) in which the default method's regret is at most 0.5 %.

    python benchmarks/evidence.py [--short] [--anyway] [--out FOLDER] [--work FOLDER] [--seeds N] [--only-done]

A cell takes about a quarter of an hour on two cores. `--work` keeps what was run, so a stopped experiment goes on;
`--only-done` reports on the cells that are there.
"""

import statistics
import sys
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from evidence_claims import balance, cross_exponents, order
from evidence_methods import Document, Grid, Prices, key, others, ours
from evidence_runs import FULL, SHORT, Cell, Form, run_cell
from own import parser as own_parser
from own import publish
from trials import RULES

from mars_jax import compile_cache

TASKS = {
    "eye": ["--style", "negative", "--eye", "1", "--tongue", "0.2"],
    "tongue": ["--style", "hue", "--eye", "0", "--tongue", "1"],
    "both": ["--style", "hue", "--eye", "1", "--tongue", "0.4"],
}
DEFAULT_METHOD = "splice, chosen form, sweep"
ENOUGH = 0.005


def main() -> None:
    """Writes results/evidence.json."""
    parser = own_parser(__doc__)
    parser.add_argument("--work", type=Path, help="folder that keeps lanes")
    parser.add_argument("--seeds", type=int, default=5, help="seeds of each task")
    parser.add_argument("--only-done", action="store_true", help="report on the cells that are there")
    options = parser.parse_args()
    form = SHORT if options.short else FULL
    seeds = 1 if options.short else options.seeds
    compile_cache.enable()
    with nullcontext(options.work) if options.work else TemporaryDirectory() as folder:
        cells = [
            judged(task, seed, cell)
            for task, seed, cell in run_cells(Path(folder), form, seeds, only_done=options.only_done)
        ]
    if not cells:
        sys.exit("no cell is there yet")
    publish(
        options,
        "evidence",
        share_within(cells, DEFAULT_METHOD),
        f"share of {len(cells)} cells with a regret of at most {ENOUGH:.1%}",
        "at least 0.95",
        {"tables": tables(cells), "cells": cells},
    )


def run_cells(folder: Path, form: Form, seeds: int, *, only_done: bool) -> Iterable[tuple[str, int, Cell]]:
    """Every task for one seed after the other."""
    for seed in range(seeds):
        for task, shift in TASKS.items():
            if not only_done or (folder / task / f"seed{seed}" / "rates.json").exists():
                cell = run_cell(folder / task, form, shift, seed, lambda text: print(text, file=sys.stderr, flush=True))
                yield task, seed, cell


def judged(task: str, seed: int, cell: Cell) -> Document:
    """Everything that is told of a cell."""
    grid, prices = Grid(cell.grid), Prices(cell)
    mine, laws = ours(cell, grid, prices)
    methods = [*mine, *others(cell, grid, prices)]
    return {
        "task": task,
        "seed": seed,
        "grid": [{"ranks": run.ranks, "loss": run.loss, "test_loss": run.test_loss} for run in cell.grid],
        "methods": [method._asdict() for method in methods],
        "probes": {rule: prices.probes(cell, rule) for rule in RULES},
        "balance": {rule: balance(cell, of_rule, grid) for rule, of_rule in laws.items()},
        "order": {rule: order(cell, of_rule, grid) for rule, of_rule in laws.items()},
        "cross_exponents": {rule: cross_exponents(cell, rule) for rule in RULES},
        "exponents": {
            rule: {module: {"gamma": law.gamma, "delta": law.delta} for module, law in of_rule.convergence.items()}
            for rule, of_rule in laws.items()
        },
        "forms": {rule: of_rule.performance.form for rule, of_rule in laws.items()},
        "balance_unknown": [rule for rule in RULES if rule not in laws or laws[rule].untimed],
    }


def share_within(cells: Sequence[Document], name: str) -> float:
    """Share of cells in which a method's regret is at most `ENOUGH`; a cell in which it has none counts against it."""
    return statistics.mean(any(m["name"] == name and m["regret"] <= ENOUGH for m in cell["methods"]) for cell in cells)


def tables(cells: Sequence[Document]) -> Document:
    """The result's tables."""
    names = list(dict.fromkeys(method["name"] for cell in cells for method in cell["methods"]))
    tasks = list(dict.fromkeys(cell["task"] for cell in cells))
    return {
        "Methods, over all cells": [of_method(name, cells) for name in names],
        "Mean regret by task": [
            {"method": name, **{task: _mean_regret(name, [c for c in cells if c["task"] == task]) for task in tasks}}
            for name in names
        ],
        "Grids": [of_grid(cell) for cell in cells],
        "Kendall tau of predicted and true order of the grid": [
            {"task": cell["task"], "seed": cell["seed"], **{f"{rule}, {form}": tau for form, tau in forms.items()}}
            for cell in cells
            for rule, forms in cell["order"].items()
            if rule == "drift" or len(cell["order"]) == 1
        ],
        "Correlation of imbalance and final loss over the grid": [
            {"task": cell["task"], "seed": cell["seed"], "rule": rule, **found}
            for cell in cells
            for rule, found in cell["balance"].items()
        ],
        "Exponent of the other module's rank in a module's time": [
            {"task": cell["task"], "seed": cell["seed"], "rule": rule, "module": module, **found}
            for cell in cells
            for rule, modules in cell["cross_exponents"].items()
            for module, found in modules.items()
        ],
    }


def of_method(name: str, cells: Sequence[Document]) -> Document:
    """Mean regret of a method with its range, and what it costs."""
    found = [method for cell in cells for method in cell["methods"] if method["name"] == name]
    regrets = [method["regret"] for method in found]
    return {
        "method": name,
        "cells": len(found),
        "mean regret": statistics.mean(regrets),
        "worst": max(regrets),
        "within 0.5 %": share_within(cells, name),
        "mean test regret": statistics.mean(method["test_regret"] for method in found),
        "mean expected regret": expected_regret(name, cells),
        "compute, final runs": statistics.mean(method["compute"] for method in found),
    }


def expected_regret(name: str, cells: Sequence[Document]) -> float | None:
    """Mean regret of a method's picks in losses that are means over a task's seeds: what isn't the luck of one run.

    None for methods that don't pick ranks, and with a single seed.
    """
    regrets = []
    for task in {cell["task"] for cell in cells}:
        of_task = [cell for cell in cells if cell["task"] == task]
        losses = [{key(run["ranks"]): run["loss"] for run in cell["grid"]} for cell in of_task]
        means = {pair: statistics.mean(loss[pair] for loss in losses) for pair in losses[0]}
        picks = [m["ranks"] for cell in of_task for m in cell["methods"] if m["name"] == name]
        if len(of_task) == 1 or not all(picks):
            return None
        regrets += [means[key(pick)] / min(means.values()) - 1.0 for pick in picks]
    return statistics.mean(regrets)


def of_grid(cell: Document) -> dict[str, Any]:
    """The best and the worst pair of a cell, and how far apart they are."""
    best, worst = (choose(cell["grid"], key=lambda run: run["loss"]) for choose in (min, max))
    ranks = [", ".join(f"{m} {r}" for m, r in run["ranks"].items() if m != "projector") for run in (best, worst)]
    return {
        "task": cell["task"],
        "seed": cell["seed"],
        "best": ranks[0],
        "loss": best["loss"],
        "worst": ranks[1],
        "worst / best": worst["loss"] / best["loss"],
    }


def _mean_regret(name: str, cells: Sequence[Document]) -> float | None:
    found = [method["regret"] for cell in cells for method in cell["methods"] if method["name"] == name]
    return statistics.mean(found) if found else None


if __name__ == "__main__":
    main()
