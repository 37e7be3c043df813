"""What the lanes of a cell show of the paper's claims: balance, the laws' order, independence of times."""

import itertools
import math

import numpy as np

from benchmarks.evidence.methods import selected, surface_draws
from benchmarks.evidence.replay import Grid, joint, key
from benchmarks.evidence.runs import SEARCHED, Cell, Probes
from benchmarks.lib.trials import RULES, records_by
from mars_jax.laws.fit import Laws
from mars_jax.runtime.jsonfiles import Document


def balance(cell: Cell, laws: Laws, grid: Grid) -> Document:
    """Whether balanced pairs end better: correlation of log imbalance and loss over the grid, also given the ranks.

    Given are the logarithms of both ranks and of the number of parameters. The interval is Fisher's.
    """
    selection = selected(cell, laws)
    imbalance = np.asarray([c.imbalance for c in selection.candidates], float)
    loss = np.asarray([grid.runs[key(c.ranks)].loss for c in selection.candidates])
    ranks = np.log([[c.ranks[module] for module in SEARCHED] for c in selection.candidates])
    given = np.column_stack([ranks, np.log([c.parameters for c in selection.candidates])])
    partial = _correlation(*_residuals(np.column_stack([np.ones(len(loss)), given]), imbalance, loss))
    interval = None
    if partial is not None:
        width = 1.96 / math.sqrt(len(loss) - 3 - given.shape[1])
        interval = [math.tanh(math.atanh(partial) + sign * width) for sign in (-1, 1)]
    return {
        "correlation": _correlation(imbalance, loss),
        "partial": None if partial is None else {"value": partial, "interval": interval},
    }


def _residuals(given: np.ndarray, *columns: np.ndarray) -> list[np.ndarray]:
    return [column - given @ np.linalg.lstsq(given, column, rcond=None)[0] for column in columns]


def _correlation(left: np.ndarray, right: np.ndarray) -> float | None:
    spread = np.std(left) * np.std(right)
    return float(np.mean((left - left.mean()) * (right - right.mean())) / spread) if spread > 1e-12 else None


def order(cell: Cell, probes: Probes, laws: Laws, grid: Grid) -> Document:
    """Kendall tau of predicted and true order of the grid at the target D, by each form."""
    from scipy.stats import kendalltau

    vectors = [run.ranks for run in grid.runs.values()]
    true = [run.loss for run in grid.runs.values()]
    target = cell.job.data.target_num_samples()
    predictions = {
        "chosen form": laws.performance.loss(vectors, target),
        "power form": laws.multiplicative.loss(vectors, target),
        "quadratic surface": surface_draws(probes, vectors, target).mean(axis=0),
    }
    return {
        name: None if np.ptp(predicted) == 0 else float(kendalltau(predicted, true).statistic)
        for name, predicted in predictions.items()
    }


def cross_exponents(probes: Probes, rule: str) -> Document:
    """Exponent of the other module's rank in a module's time, given its own rank and D, over joint lanes."""
    records = records_by(RULES[rule], probes.job.config, probes.lanes, probes.curves)
    found: Document = {}
    for module, other in itertools.permutations(SEARCHED):
        points = [
            (math.log(r.ranks[module]), math.log(r.ranks[other]), math.log(r.num_samples), math.log(steps))
            for lane, r in zip(probes.lanes, records, strict=True)
            if joint(lane) and not r.censored.get(module, True)
            for steps in [r.convergence_steps.get(module)]
            if steps
        ]
        if len(points) < 6:
            continue
        data = np.asarray(points)
        design = np.column_stack([np.ones(len(data)), data[:, :3]])
        solution = np.linalg.lstsq(design, data[:, 3], rcond=None)[0]
        found[module] = {"points": len(points), "own": float(solution[1]), "other": float(solution[2])}
    return found


def retuned(cell: Cell, grid: Grid) -> list[Document]:
    """A few pairs at the config's learning rate, and at the best of it and those tried beside it."""
    found = []
    for pair in dict.fromkeys(key(run.ranks) for _, run in cell.retuned):
        losses = {1.0: grid.runs[pair].loss}
        losses |= {factor: run.loss for factor, run in cell.retuned if key(run.ranks) == pair}
        factor = min(losses, key=lambda factor: losses[factor])
        found.append(
            {"ranks": ", ".join(map(str, pair)), "loss": losses[1.0], "tuned loss": losses[factor], "factor": factor}
        )
    return found
