"""What each way of choosing ranks picks in a cell of `evidence.py`, at what compute, read off lanes that ran already.

Nothing is trained here: a final run is a function of ranks and seed, so to run it again for another method would give
the same numbers. Compute is counted in FLOPs (closed form, own ranks, no padding) and told in final runs, one being the
mean of the grid's.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks.evidence.runs import SEARCHED, UNIFORM_RANK, Cell, Probes, Run
from benchmarks.lib.trials import RULES, records_by
from mars_jax.adapters.targets import parameters_per_rank
from mars_jax.errors import NoValidResultError
from mars_jax.job.prices import look_flops, step_flops
from mars_jax.lanes.halving import halving_schedule, survivors
from mars_jax.lanes.lane import Lane
from mars_jax.lanes.stopping import GoesOn, Look, until_stopped
from mars_jax.laws.fit import Laws, fit_laws
from mars_jax.search.probes.design import rank_vectors
from mars_jax.search.probes.swaps import hybrids
from mars_jax.search.selection import Selection
from mars_jax.search.strategies import tpe
from mars_jax.search.strategies.laws import select

Document = dict[str, Any]

REPLAYS = 20  # of TPE
BUDGETS = (2, 3, 4, 6, 8)
LOSS_ALONE = "loss alone"  # no rule: nothing tells when a module has converged
HUBER = 0.02
SWEPT = (4, 8)


class Grid:
    """The final runs of a cell: the oracle, and regrets against it."""

    def __init__(self, runs: Sequence[Run]) -> None:
        """Of every rank vector."""
        self.runs = {key(run.ranks): run for run in runs}
        self.best = min(run.loss for run in runs)
        self.best_test = min(run.test_loss for run in runs)

    def regret(self, run: Run) -> Document:
        """Relative to the best of the grid: of the validation loss, and of the test loss."""
        return {
            "regret": run.loss / self.best - 1.0,
            "test_regret": run.test_loss / self.best_test - 1.0,
        }


def joint(lane: Lane) -> bool:
    """Whether a lane adapts all modules."""
    return len(lane.adapted) == len(lane.ranks)


def key(ranks: Mapping[str, int]) -> tuple[int, ...]:
    """Of the searched modules."""
    return tuple(ranks[module] for module in SEARCHED)


class Method(NamedTuple):
    """A way to choose: its name, its regrets, its compute in final runs (its own final run counted), what it picked."""

    name: str
    regret: float
    test_regret: float
    compute: float
    ranks: Document | None = None
    p_best: float | None = None


# Compute.


class Prices:
    """FLOPs in units of a final run, the mean over the grid."""

    def __init__(self, cell: Cell) -> None:
        """Of a cell."""
        self._workspace = cell.workspace
        self._final = 1.0
        self._final = statistics.mean(self.final(run.ranks) for run in cell.grid)

    def final(self, ranks: Mapping[str, int], share: float = 1.0) -> float:
        """A share of a final run."""
        settings = self._workspace.config.finetune
        looks = settings.steps / settings.look_every
        return share * self._price(ranks, settings.steps, looks, settings.validation_samples)

    def probes(self, probes: Probes, rule: str) -> float:
        """The probes that a rule needs, with their looks and hybrids."""
        settings = probes.workspace.config.probe
        largest, total = max(lane.num_samples for lane in probes.lanes), 0.0
        for lane, rows in zip(probes.lanes, probes.rows, strict=True):
            if not (joint(lane) or rule == "loss_fraction"):
                continue
            extra = len(hybrids(SEARCHED)) * sum(any(row["remaining"].values()) for row in rows)
            # Nested smaller D are read off the same pass, but what remains is read anew.
            ran = settings.sampling == "separate" or lane.num_samples == largest
            steps, looks = (rows[-1]["step"], len(rows) - 1) if ran else (0, 0)
            looks += extra if rule == "splice" else 0
            total += self._price(lane.ranks, steps, looks, settings.validation_samples)
        return total

    def _price(self, ranks: Mapping[str, int], steps: float, looks: float, samples: int) -> float:
        workspace, cached = self._workspace, not ranks["vision"]
        flops = steps * step_flops(workspace, ranks, cached_encoder=cached)
        flops += looks * look_flops(workspace, ranks, samples, cached_encoder=cached)
        return flops / self._final


# Ours.


def ours(cell: Cell, sampling: str, grid: Grid, prices: Prices) -> tuple[list[Method], dict[str, Laws]]:
    """The picks from some probes by each rule and form, the sweeps of probes and laws, and the laws of each rule."""
    probes = cell.probes[sampling]
    laws_of = {rule: laws for rule in (*RULES, LOSS_ALONE) if (laws := fitted(probes, rule)) is not None}
    found = []
    for rule, laws in laws_of.items():
        search = prices.probes(probes, rule)
        forms = ["chosen form"]
        forms += ["power form"] if laws.performance is not laws.multiplicative else []
        forms += ["paper"] if len(laws.convergence) == len(SEARCHED) else []
        for form in forms:
            found.append(_picked(f"{rule}, {form}", selected(cell, laws, form), grid, prices, search))
    bent = fitted(probes, LOSS_ALONE, huber=HUBER)
    if bent:
        search = prices.probes(probes, LOSS_ALONE)
        found.append(_picked(f"{LOSS_ALONE}, Huber", selected(cell, bent, "chosen form"), grid, prices, search))
    found += _without_laws(cell, probes, laws_of, grid, prices)
    return [method._replace(name=f"{sampling}: {method.name}") for method in found], laws_of


def fitted(probes: Probes, rule: str, huber: float | None = None) -> Laws | None:
    """The laws by a rule; None where the lanes don't determine Law-P."""
    records = records_by(RULES.get(rule), probes.workspace, probes.lanes, probes.rows)
    looks = probes.workspace.config.probe.looks_per_doubling
    interval = 2 ** (1 / looks) - 1
    try:
        return fit_laws(records, key=jax.random.key(0), measuring_interval=interval, huber=huber)
    except NoValidResultError:
        return None


def selected(cell: Cell, laws: Laws, form: str) -> Selection:
    """The selection at the target D by a form of Law-P, or by the paper's method."""
    if form == "power form":
        laws = replace(laws, performance=laws.multiplicative)
    workspace = cell.workspace
    return select(
        laws,
        workspace.grids,
        workspace.target_num_samples(),
        method="paper" if form == "paper" else "laws",
        parameters_per_rank=parameters_per_rank(workspace.targets),
    )


def sweep(candidates: Sequence[Mapping[str, int]], grid: Grid, prices: Prices) -> tuple[Mapping[str, int], float]:
    """Successive halving over candidates on the final runs' own curves: the winner, and what the others cost."""
    candidates = list(candidates)
    steps = grid.runs[key(candidates[0])].curve[-1][0]
    cost, before = 0.0, 0
    for rung in halving_schedule(len(candidates), steps):
        cost += sum(prices.final(ranks, (rung.steps - before) / steps) for ranks in candidates)
        losses = [_best_until(grid.runs[key(ranks)], rung.steps) for ranks in candidates]
        candidates = [candidates[place] for place in survivors(losses, rung.survivors)]
        before = rung.steps
    # The winner has had its final run.
    return candidates[0], cost - prices.final(candidates[0])


def _swept(name: str, candidates: Sequence[Mapping[str, int]], grid: Grid, prices: Prices, search: float) -> Method:
    winner, cost = sweep(candidates, grid, prices)
    return _of_run(name, grid.runs[key(winner)], grid, search + cost + prices.final(winner))


def _best_until(run: Run, step: int) -> float:
    return min(loss for at, loss in run.curve if at <= step)


def _of_run(name: str, run: Run, grid: Grid, compute: float) -> Method:
    return Method(name, **grid.regret(run), compute=compute, ranks=dict(run.ranks))


def _picked(name: str, selection: Selection, grid: Grid, prices: Prices, search: float) -> Method:
    run = grid.runs[key(selection.pick)]
    method = _of_run(name, run, grid, search + prices.final(run.ranks))
    return method._replace(p_best=selection.p_best)


def surface_draws(probes: Probes, vectors: Sequence[Mapping[str, int]], target: int) -> np.ndarray:
    """Losses of rank vectors at D = target by a quadratic surface in place of Law-P, [draws, Q].

    log p is linear in log r and its square of each module, log D, and log r log D, so a module can have its best rank
    inside the grid. Ridge regression, a hundredth of a point on all but the intercept; resamples of (ranks, D) cells.
    """
    losses = best_losses(probes)
    design = _terms([lane.ranks for lane, _ in losses], np.asarray([lane.num_samples for lane, _ in losses]))
    log_loss = np.log([loss for _, loss in losses])
    wanted = _terms(vectors, np.full(len(vectors), target))
    penalty = 0.01 * np.eye(design.shape[1])
    penalty[0, 0] = 1e-9
    rng = np.random.default_rng(0)
    counts = [np.bincount(rng.integers(0, len(losses), len(losses)), minlength=len(losses)) for _ in range(200)]
    solutions = [
        np.linalg.solve(design.T @ (count[:, None] * design) + penalty, design.T @ (count * log_loss))
        for count in counts
    ]
    return np.exp(np.asarray(solutions) @ wanted.T)


def best_losses(probes: Probes) -> list[tuple[Lane, float]]:
    """The lowest validation loss of every joint lane."""
    return [
        (lane, min(row["validation_loss"] for row in rows))
        for lane, rows in zip(probes.lanes, probes.rows, strict=True)
        if joint(lane)
    ]


def _terms(vectors: Sequence[Mapping[str, int]], num_samples: np.ndarray) -> np.ndarray:
    ranks = np.log(np.asarray([[vector[module] for module in SEARCHED] for vector in vectors]) / 8.0)
    samples = np.log(num_samples / 1024.0)[:, None]
    return np.column_stack([np.ones(len(ranks)), ranks, samples, ranks**2, ranks * samples])


def _without_laws(cell: Cell, probes: Probes, laws_of: Mapping[str, Laws], grid: Grid, prices: Prices) -> list[Method]:
    """What remains of the method without Law-P: a surface in its place, the best probes themselves, balance alone."""
    vectors = [run.ranks for run in grid.runs.values()]
    search = prices.probes(probes, LOSS_ALONE)
    predicted = surface_draws(probes, vectors, cell.workspace.target_num_samples()).mean(axis=0)
    largest = max(lane.num_samples for lane in probes.lanes)
    probed = sorted((loss, key(lane.ranks)) for lane, loss in best_losses(probes) if lane.num_samples == largest)
    ordered = {
        "quadratic surface": [vectors[place] for place in np.argsort(predicted)],
        "best probe": [grid.runs[pair].ranks for _, pair in probed],
    }
    found = []
    for name, some in ordered.items():
        found.append(_swept(name, some[:1], grid, prices, search))
        found += [_swept(f"{name}, sweep of {number}", some[:number], grid, prices, search) for number in SWEPT]
    if LOSS_ALONE in laws_of:
        selection = selected(cell, laws_of[LOSS_ALONE], "chosen form")
        first = [c.ranks for c in sorted(selection.candidates, key=lambda candidate: candidate.predicted_loss)]
        found += [_swept(f"{LOSS_ALONE}, sweep of {number}", first[:number], grid, prices, search) for number in SWEPT]
        mixed = [ranks for ranks in ordered["best probe"] if key(ranks) != key(selection.pick)]
        for number in SWEPT:
            some = [selection.pick, *mixed[: number - 1]]
            found.append(_swept(f"best probe and the laws' pick, sweep of {number}", some, grid, prices, search))
    for rule, laws in laws_of.items():
        if len(laws.convergence) == len(SEARCHED):
            balances = [(c.imbalance, key(c.ranks)) for c in selected(cell, laws, "chosen form").candidates]
            pair = min((imbalance, pair) for imbalance, pair in balances if imbalance is not None)[1]
            price = prices.probes(probes, rule)
            found.append(_swept(f"{rule}, balance alone", [grid.runs[pair].ranks], grid, prices, price))
    return found


# Others.


def others(cell: Cell, grid: Grid, prices: Prices) -> list[Method]:
    """Fixed ranks, chance, random search, TPE with successive halving, and separate learning rates."""
    runs = list(grid.runs.values())
    ranks = sorted({run.ranks["llm"] for run in runs})
    found = [
        _of_run(f"uniform rank {rank}", run, grid, prices.final(run.ranks))
        for rank in ranks
        for run in [grid.runs[rank, rank]]
    ]
    found.append(
        Method(
            "random pair",
            **_mean([grid.regret(run) for run in runs]),
            compute=1.0,
        )
    )
    found += [
        Method(f"random search, {number} runs", **_best_of_random(runs, grid, number), compute=float(number))
        for number in (2, 3, 4, 6, 8, 12, 16)
        if number < len(runs)
    ]
    uniform = grid.runs[UNIFORM_RANK, UNIFORM_RANK]
    rated = min([uniform, *(run for _, run in cell.rates)], key=lambda run: run.loss)
    price = (1 + len(cell.rates)) * prices.final(uniform.ranks)
    found.append(Method("separate learning rates at rank 8", **grid.regret(rated), compute=price))
    probed = rank_vectors(cell.workspace.grids, corners=True)
    for name, some in (("all pairs", [run.ranks for run in runs]), ("the pairs of the probes", probed)):
        found.append(_swept(f"successive halving of {name}, no probes", some, grid, prices, 0.0))
    return found + by_tpe(grid, prices)


def _best_of_random(runs: Sequence[Run], grid: Grid, number: int) -> Document:
    """Expected regrets of the best of `number` different pairs drawn evenly: exact for the validation loss."""
    ordered = sorted(runs, key=lambda run: run.loss)
    every = math.comb(len(runs), number)
    weights = [math.comb(len(runs) - 1 - place, number - 1) / every for place in range(len(runs))]
    regrets = [grid.regret(run) for run in ordered]
    return {
        name: math.fsum(weight * regret[name] for weight, regret in zip(weights, regrets, strict=True))
        for name in ("regret", "test_regret")
    }


def by_tpe(grid: Grid, prices: Prices) -> list[Method]:
    """Optuna's TPE with its asynchronous successive halving, on the curves of the final runs; mean of replays."""
    runs = list(grid.runs.values())
    steps = runs[0].curve[-1][0]
    grids = {module: sorted({run.ranks[module] for run in runs}) for module in SEARCHED}

    def train(ranks: Mapping[str, int], goes_on: GoesOn) -> list[Look]:
        return until_stopped(grid.runs[key(ranks)].curve, goes_on)

    found = []
    for budget in BUDGETS:
        regrets, costs = [], []
        for replay in range(REPLAYS):
            asked = [
                (run, grid.runs[key(run.ranks)]) for run in tpe.search(grids, steps, budget * steps, replay, train)
            ]
            whole = [run for part, run in asked if part.steps == steps]
            regrets.append(grid.regret(min(whole, key=lambda run: run.loss)))
            costs.append(sum(prices.final(run.ranks, part.steps / steps) for part, run in asked))
        name = f"TPE and halving, steps of {budget} runs"
        found.append(Method(name, **_mean(regrets), compute=statistics.mean(costs)))
    return found


def _mean(regrets: Sequence[Document]) -> Document:
    return {name: statistics.mean(regret[name] for regret in regrets) for name in ("regret", "test_regret")}
