"""Share of tasks and seeds in which the pick of ranks ends as well as the best pair of a whole grid.

Regret of MARS' picks and of the alternatives, on three tasks that shift easy-VQA for the demo's base: "eye" negates
pictures and puts three of thirteen answers into German, "tongue" keeps pictures and puts all answers into German,
"both" rotates hues and puts five into German. (With negated pictures and no new answer the spread of a grid was that of
its noise: ranks don't matter there.) For each task and seed, a cell, every pair of five ranks is trained to the end
(320 steps of 16, one pass over 5120 samples, cosine): the oracle. Regret is the validation loss of a method's final run
over the grid's lowest, minus one; test regret the same of test losses, each run being read at its best eval point. All
methods see validation losses only.

Probes at a constant rate are of two kinds. Nested: one pass over 1280 samples, read at 320, 640 and 1280, so the laws
are extrapolated by 4 in D; "half" and "quarter" nested probes are the same passes, stopped there. Separate, the paper's
way: 160 steps over 128 and over 512 samples again and again, long enough for modules to converge; for the first seed of
each task only, as are the final runs with other learning rates.

Runs of one pair differ between seeds, so the lowest of 25 losses is partly luck, which no method can pick. "Expected"
regret is of losses that are means over the seeds of a task.

Compute is counted in final runs, the winner's own included. Final runs are only four times as long as a probe here, so
that a whole grid of them can be paid for: a search that costs several of them costs little beside long ones.

Methods are named by probes, convergence rule and form of Law-P ("power form" where another was chosen); a rule that
can't time both modules leaves the pick to the loss. "Sweep" is successive halving over the final runs' own curves, of
the pairs that the laws predict to be the best or of the "best probes", those with the lowest loss measured at the
largest D read. TPE is optuna's, with asynchronous successive halving, replayed on the recorded curves (mean of 20
replays); random search is the exact expectation. Methods are in methods.py, prices in replay.py, checks of the paper's
claims in claims.py, lanes in runs.py.

figure = share of cells in which the regret of what the tool does by default, a sweep of the four best probes of an
eighth of a final run's samples, is at most 0.5 %.

    python -m benchmarks.evidence.run [--short] [--anyway] [--out FOLDER] [--work FOLDER] [--seeds N] [--only-done]

A cell takes 5 to 13 minutes on two cores, by the machine, one with separate probes and other rates twice as long.
`--work` keeps what was run, so a stopped experiment goes on; `--only-done` reports on the cells that are there.
"""

import sys
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.evidence.claims import balance, cross_exponents, order, retuned
from benchmarks.evidence.methods import others, ours
from benchmarks.evidence.replay import Grid, Prices
from benchmarks.evidence.runs import FULL, SEARCHED, SHORT, Cell, Form, run_cell
from benchmarks.evidence.tables import ENOUGH, share_within, tables
from benchmarks.lib.child import argument_parser, publish
from benchmarks.lib.trials import RULES
from mars_jax.laws.fit import Laws
from mars_jax.runtime import compile_cache
from mars_jax.runtime.jsonfiles import Document

TASKS = {
    "eye": ["--style", "negative", "--eye", "1", "--tongue", "0.2"],
    "tongue": ["--style", "hue", "--eye", "0", "--tongue", "1"],
    "both": ["--style", "hue", "--eye", "1", "--tongue", "0.4"],
}
DEFAULT_METHOD = "half nested: best probe, sweep of 4"


def main() -> None:
    """Writes results/evidence.json."""
    parser = argument_parser(__doc__)
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
    """Everything that the result has of a cell."""
    grid, prices = Grid(cell.grid, cell.rates), Prices(cell)
    methods = others(cell, grid, prices)
    claims = {}
    for sampling, probes in cell.probes.items():
        mine, laws = ours(cell, sampling, grid, prices)
        methods = [*methods, *mine]
        claims[sampling] = {
            "compute": {rule: prices.of_rule(probes, rule) for rule in RULES},
            "balance": {
                rule: balance(cell, of_rule, grid)
                for rule, of_rule in laws.items()
                if len(of_rule.convergence) == len(SEARCHED)
            },
            "order": order(cell, probes, next(iter(laws.values())), grid) if laws else {},
            "cross_exponents": {rule: cross_exponents(probes, rule) for rule in RULES},
            "laws": {rule: without_draws(of_rule) for rule, of_rule in laws.items()},
        }
    return {
        "task": task,
        "seed": seed,
        "grid": [{"ranks": run.ranks, "loss": run.loss, "test_loss": run.test_loss} for run in cell.grid],
        "methods": [method._asdict() for method in methods],
        "retuned": retuned(cell, grid),
        "claims": claims,
    }


def without_draws(laws: Laws) -> Document:
    """The laws' parameters."""
    document = laws.to_json()
    return {name: document[name] for name in ("convergence", "untimed", "performance", "multiplicative")}


if __name__ == "__main__":
    main()
