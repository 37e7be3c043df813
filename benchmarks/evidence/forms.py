"""How forms of Law-P order configurations that they were not fitted to, on the tabular benchmark.

Definitions. In each cell some configurations that train both modules are drawn, and each form is fitted by least
squares to the logs of their validation losses at a part of the run; amplitudes are >= 0 where the form's terms say so.
It then predicts all others. `order` is Kendall's tau between these predictions and the losses at the end of the run (1:
the same order); `pick` is how much the configuration that the form expects to be lowest of all ends above the lowest of
the cell. Means over cells and draws. s is a module's step size, rank times learning rate. Beside the forms stands the
order of the losses themselves, of all these configurations at a part of their runs.

figure = order by the form of `laws.law_steps` after half of a run of ten configurations.

    python -m benchmarks.evidence.forms
"""

import statistics
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from scipy.optimize import lsq_linear
from scipy.stats import kendalltau

from benchmarks.evidence.design import LENGTHS, SEARCHED
from benchmarks.evidence.replays import space_of
from benchmarks.evidence.table import Cell, read_table
from benchmarks.lib.child import arguments, publish
from mars_jax.laws.law_steps import FALL, RISE
from mars_jax.runtime.jsonfiles import Document
from mars_jax.search.trainer import Curve

RUNS = (6, 10, 16)
PARTS = (1 / 4, 1 / 2, 1.0)
DRAWS = 20

Basis = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(log2 ranks [N, M], log2 rate factors [N, M]) -> terms [N, n]."""


def _steps(fall: float | None, rise: float | None) -> Basis:
    def terms(ranks: np.ndarray, factors: np.ndarray) -> np.ndarray:
        octaves = ranks - 3.0 + factors
        signs = [sign for sign in (None if fall is None else -fall, rise) if sign is not None]
        return np.concatenate([2.0 ** (sign * octaves) for sign in signs], axis=1)

    return terms


def _quadratic(values: np.ndarray) -> np.ndarray:
    pairs = [values[:, i] * values[:, j] for i in range(values.shape[1]) for j in range(i, values.shape[1])]
    return np.concatenate([values, np.stack(pairs, axis=1)], axis=1)


FORMS: Mapping[str, tuple[Basis, bool]] = {
    "ranks alone, r^-1/2 (the paper's)": (lambda ranks, factors: 2.0 ** (-0.5 * (ranks - 3.0)), True),
    "s^-1/2": (_steps(0.5, None), True),
    "quadratic in log r and log rate": (lambda ranks, factors: _quadratic(np.hstack([ranks - 3.0, factors])), False),
    "quadratic in log s": (lambda ranks, factors: _quadratic(ranks - 3.0 + factors), False),
    **{
        f"s^-{fall:g} and s^{rise:g}": (_steps(fall, rise), True)
        for fall in (0.25, 0.5, 1.0)
        for rise in (0.5, 1.0, 1.5)
    },
}
"""Name -> terms besides a constant, and whether their weights are >= 0."""

CHOSEN = f"s^-{FALL:g} and s^{RISE:g}"


def main() -> None:
    """Fits every form, and publishes the orders."""
    options = arguments(__doc__)
    cells = [cell for cell in read_table() if cell.steps == LENGTHS[0]]
    forms, draws = ([CHOSEN], 2) if options.short else (list(FORMS), DRAWS)
    rows = [_row(form, part, runs, cells, draws) for form in forms for part in PARTS for runs in RUNS]
    (figure,) = [row["order"] for row in rows if (row["form"], row["part"], row["runs"]) == (CHOSEN, 0.5, 10)]
    parts = [_order_of_losses(part, cells) for part in (1 / 8, 1 / 4, 1 / 2, 3 / 4)]
    tables = {"Order and pick by form": rows, "Order of the losses themselves": parts}
    detail = {"cells": [cell.name for cell in cells], "tables": tables}
    publish(options, "law_forms", figure, "Kendall's tau", "none: this is what the form is chosen by", detail)


def _row(form: str, part: float, runs: int, cells: Sequence[Cell], draws: int) -> Document:
    found = [_held_out(cell, form, part, runs, draw) for cell in cells for draw in range(draws)]
    orders, picks = zip(*found, strict=True)
    return {
        "form": form,
        "part": part,
        "runs": runs,
        "order": statistics.mean(orders),
        "pick": statistics.mean(picks),
    }


def _order_of_losses(part: float, cells: Sequence[Cell]) -> Document:
    """How the losses at a part of the runs order their ends, and how far above the lowest the lowest of them ends."""
    found = [(_losses_at(cell, part), _ends(cell)) for cell in cells]
    picks = [float(ends[np.argmin(losses)] / ends.min() - 1.0) for losses, ends in found]
    return {
        "part": part,
        "order": statistics.mean(float(kendalltau(losses, ends)[0]) for losses, ends in found),
        "pick": statistics.mean(picks),
        "worst pick": max(picks),
    }


def _curves(cell: Cell) -> list[Curve]:
    """Those of all combinations of ranks and rates that did not diverge."""
    names = {one.name for one in space_of(cell).every()}
    return [run.curve for run in cell.runs if run.curve.configuration.name in names and np.isfinite(run.curve.loss)]


def _losses_at(cell: Cell, part: float) -> np.ndarray:
    """[N] validation losses of `_curves` at a part of their steps."""
    step = round(part * cell.steps)
    return np.array([next(p.validation_loss for p in curve.points if p.step == step) for curve in _curves(cell)])


def _ends(cell: Cell) -> np.ndarray:
    """[N] losses that `_curves` came to."""
    return np.array([curve.loss for curve in _curves(cell)])


def _held_out(cell: Cell, form: str, part: float, runs: int, draw: int) -> tuple[float, float]:
    """Order of the configurations that a form was not fitted to, and regret of its pick among all."""
    curves = _curves(cell)
    ranks = np.log2([[curve.configuration.ranks[module] for module in SEARCHED] for curve in curves])
    factors = np.log2([[curve.configuration.factors.get(module, 1.0) for module in SEARCHED] for curve in curves])
    losses, ends = _losses_at(cell, part), _ends(cell)
    chosen = np.random.default_rng((draw, runs)).permutation(len(curves))[:runs]
    terms, positive = FORMS[form]
    columns = np.concatenate([np.ones((len(curves), 1)), terms(ranks, factors)], axis=1)
    lowest = np.array([-np.inf, *[0.0 if positive else -np.inf] * (columns.shape[1] - 1)])
    if positive:
        weights = lsq_linear(columns[chosen], np.log(losses[chosen]), (lowest, np.inf), method="bvls").x
    else:  # There may be more terms than runs: the smallest weights.
        weights = np.linalg.lstsq(columns[chosen], np.log(losses[chosen]), rcond=None)[0]
    expected = columns @ weights
    others = np.setdiff1d(np.arange(len(curves)), chosen)
    order = float(np.nan_to_num(kendalltau(expected[others], ends[others])[0]))
    return order, float(ends[np.argmin(expected)] / ends.min() - 1.0)


if __name__ == "__main__":
    main()
