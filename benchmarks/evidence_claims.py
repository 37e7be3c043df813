"""What the lanes of a cell say of the method's claims: balance, the laws' order, independence of times."""

import itertools
import math

import numpy as np
from evidence_methods import SEARCHED, Document, Grid, key, selected, surface_draws
from evidence_runs import Cell
from trials import RULES, records_by

from mars_jax.laws import Laws


def balance(cell: Cell, laws: Laws, grid: Grid) -> Document:
    """Whether balanced pairs end better: correlation of log imbalance and loss over the grid, also given the ranks."""
    selection = selected(cell, laws, "chosen form")
    rows = [(c.imbalance, grid.runs[key(c.ranks)].loss, c) for c in selection.candidates if c.imbalance is not None]
    if not rows:
        return {"correlation": None, "partial": None}
    imbalance, loss = (np.asarray([row[i] for row in rows], float) for i in (0, 1))
    ranks = np.log([[c.ranks[module] for module in SEARCHED] for *_, c in rows])
    given = np.column_stack([np.ones(len(rows)), ranks, np.log([c.parameters for *_, c in rows])])
    return {"correlation": _correlation(imbalance, loss), "partial": _correlation(*_residuals(given, imbalance, loss))}


def _residuals(given: np.ndarray, *columns: np.ndarray) -> list[np.ndarray]:
    return [column - given @ np.linalg.lstsq(given, column, rcond=None)[0] for column in columns]


def _correlation(left: np.ndarray, right: np.ndarray) -> float | None:
    spread = np.std(left) * np.std(right)
    return float(np.mean((left - left.mean()) * (right - right.mean())) / spread) if spread > 1e-12 else None


def order(cell: Cell, laws: Laws, grid: Grid) -> Document:
    """Kendall tau of predicted and true order of the grid at the target D, by each form."""
    from scipy.stats import kendalltau

    vectors = [run.ranks for run in grid.runs.values()]
    true = [run.loss for run in grid.runs.values()]
    target = cell.workspace.target_num_samples()
    predictions = {
        "chosen form": laws.performance.loss(vectors, target),
        "power form": laws.multiplicative.loss(vectors, target),
        "quadratic surface": surface_draws(cell, vectors, target).mean(axis=0),
    }
    return {
        name: None if np.ptp(predicted) == 0 else float(kendalltau(predicted, true).statistic)
        for name, predicted in predictions.items()
    }


def cross_exponents(cell: Cell, rule: str) -> Document:
    """Exponent of the other module's rank in a module's time, given its own rank and D, over joint lanes."""
    records = records_by(RULES[rule], cell.workspace, cell.lanes, cell.rows)
    found: Document = {}
    for module, other in itertools.permutations(SEARCHED):
        points = [
            (math.log(r["ranks"][module]), math.log(r["ranks"][other]), math.log(r["num_samples"]), math.log(steps))
            for r in records
            if len(r["adapted"]) == len(r["ranks"]) and not r["censored"].get(module, True)
            for steps in [r["convergence_steps"].get(module)]
            if steps
        ]
        if len(points) < 6:
            continue
        data = np.asarray(points)
        design = np.column_stack([np.ones(len(data)), data[:, :3]])
        solution = np.linalg.lstsq(design, data[:, 3], rcond=None)[0]
        found[module] = {"points": len(points), "own": float(solution[1]), "other": float(solution[2])}
    return found
