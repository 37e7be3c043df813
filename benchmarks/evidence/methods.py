"""What each way of choosing ranks picks in a cell of `evidence`, at what compute, read off lanes that ran already.

Nothing is trained here: a final run is a function of ranks and seed, so to run it again for another method would give
the same numbers. The package's strategies are replayed through its `RecordedTrainer`; what is no strategy of the
package trains through the same trainer. Grid, prices and replays are in replay.py.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace

import jax
import numpy as np

from benchmarks.evidence.replay import Grid, Method, Prices, Replay, joint, key, needed
from benchmarks.evidence.runs import SEARCHED, UNIFORM_RANK, Cell, Probes, Run
from benchmarks.lib.trials import RULES, records_by
from mars_jax.errors import NoValidResultError
from mars_jax.lanes.lane import Lane, Ranks
from mars_jax.laws.fit import Laws, fit_laws
from mars_jax.laws.records import LaneRecord
from mars_jax.runtime.jsonfiles import Document
from mars_jax.search.probes.design import rank_vectors
from mars_jax.search.selection import Selection
from mars_jax.search.space import job_space
from mars_jax.search.strategies.base import Budget, Space
from mars_jax.search.strategies.best_probes import BEST_PROBES
from mars_jax.search.strategies.halving import HALVING
from mars_jax.search.strategies.laws import LAWS, pick_by_laws
from mars_jax.search.strategies.paper import PAPER
from mars_jax.search.strategies.separate_rates import SEPARATE_RATES
from mars_jax.search.strategies.tpe import TPE
from mars_jax.search.strategies.uniform import Uniform

REPLAYS = 20  # of TPE
BUDGETS = (2, 3, 4, 6, 8)
LOSS_ALONE = "loss alone"  # no rule: nothing finds when a module has converged
HUBER = 0.02
SWEPT = (4, 8)


# With probes.


def ours(cell: Cell, sampling: str, grid: Grid, prices: Prices) -> tuple[list[Method], dict[str, Laws]]:
    """The picks from some probes by each rule and form, the sweeps of probes and laws, and the laws of each rule."""
    probes = cell.probes[sampling]
    records = {rule: _records(probes, rule) for rule in (*RULES, LOSS_ALONE)}
    laws_of = {rule: laws for rule, some in records.items() if (laws := fitted(probes, some)) is not None}

    def with_laws(rule: str, laws: Laws) -> Replay:
        space = _probed_space(cell, grid, probes, rule, laws)
        return Replay(grid, space, prices, probes, rule, tuple(records[rule]))

    found = []
    for rule, laws in laws_of.items():
        replay = with_laws(rule, laws)
        found.append(replay.method(f"{rule}, chosen form", LAWS))
        if laws.performance is not laws.multiplicative:
            power = with_laws(rule, replace(laws, performance=laws.multiplicative))
            found.append(power.method(f"{rule}, power form", LAWS))
        if len(laws.convergence) == len(SEARCHED):
            found.append(replay.method(f"{rule}, paper", PAPER))
    bent = fitted(probes, records[LOSS_ALONE], huber=HUBER)
    if bent:
        found.append(with_laws(LOSS_ALONE, bent).method(f"{LOSS_ALONE}, Huber", LAWS))
    # Laws take part in what best probes report, not in their pick: where these probes determine none, others will do.
    any_laws = laws_of.get(LOSS_ALONE) or fitted(cell.probes["nested"], _records(cell.probes["nested"], LOSS_ALONE))
    if any_laws:
        found += _without_laws(cell, with_laws(LOSS_ALONE, any_laws), laws_of.get(LOSS_ALONE))
    for rule, laws in laws_of.items():
        if len(laws.convergence) == len(SEARCHED):
            balances = [(c.imbalance, key(c.ranks)) for c in selected(cell, laws).candidates]
            pair = min((imbalance, pair) for imbalance, pair in balances if imbalance is not None)[1]
            found.append(with_laws(rule, laws).swept(f"{rule}, balance alone", [grid.runs[pair].ranks]))
    return [method._replace(name=f"{sampling}: {method.name}") for method in found], laws_of


def _records(probes: Probes, rule: str) -> list[LaneRecord]:
    return records_by(RULES.get(rule), probes.job.config, probes.lanes, probes.curves)


def fitted(probes: Probes, records: Sequence[LaneRecord], huber: float | None = None) -> Laws | None:
    """The laws of the probes' records; None where the lanes don't determine Law-P."""
    interval = 2 ** (1 / probes.job.config.probe.looks_per_doubling) - 1
    try:
        return fit_laws(records, key=jax.random.key(0), measuring_interval=interval, huber=huber)
    except NoValidResultError:
        return None


def _probed_space(cell: Cell, grid: Grid, probes: Probes, rule: str, laws: Laws) -> Space:
    """The space of strategies that read the probes which a rule needs."""
    lanes = needed(probes, rule)
    return replace(
        job_space(cell.job),
        probed=[dict(vector) for vector in dict.fromkeys(tuple(lane.ranks.items()) for lane in lanes)],
        sizes=sorted({lane.num_samples for lane in lanes}),
        fit=lambda records: laws,
        most_together=len(grid.runs),
    )


def selected(cell: Cell, laws: Laws) -> Selection:
    """What the laws predict of every pair at the target D."""
    job = cell.job
    return pick_by_laws(laws, job.config.lora.grids, job.data.target_num_samples(), job.base.parameters_per_rank)


def surface_draws(probes: Probes, vectors: Sequence[Ranks], target: int) -> np.ndarray:
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
        (lane, min(point.validation_loss for point in points))
        for lane, points in zip(probes.lanes, probes.curves, strict=True)
        if joint(lane)
    ]


def _terms(vectors: Sequence[Ranks], num_samples: np.ndarray) -> np.ndarray:
    ranks = np.log(np.asarray([[vector[module] for module in SEARCHED] for vector in vectors]) / 8.0)
    samples = np.log(num_samples / 1024.0)[:, None]
    return np.column_stack([np.ones(len(ranks)), ranks, samples, ranks**2, ranks * samples])


def _without_laws(cell: Cell, replay: Replay, laws: Laws | None) -> list[Method]:
    """A surface in place of Law-P, the best probes themselves, and sweeps of what the laws by the loss predict."""
    grid, probes = replay.grid, replay.recorded_probes
    vectors = [run.ranks for run in grid.runs.values()]
    predicted = surface_draws(probes, vectors, cell.job.data.target_num_samples()).mean(axis=0)
    surface = [vectors[place] for place in np.argsort(predicted)]
    found = [replay.swept("quadratic surface", surface[:1])]
    found += [replay.swept(f"quadratic surface, sweep of {number}", surface[:number]) for number in SWEPT]
    names = {1: "best probe", **{number: f"best probe, sweep of {number}" for number in SWEPT}}
    found += [replay.method(name, BEST_PROBES, Budget(number)) for number, name in names.items()]
    if laws:
        selection = selected(cell, laws)
        first = [c.ranks for c in sorted(selection.candidates, key=lambda candidate: candidate.predicted_loss)]
        found += [replay.swept(f"{LOSS_ALONE}, sweep of {number}", first[:number]) for number in SWEPT]
        largest = max(lane.num_samples for lane in probes.lanes)
        probed = sorted((loss, key(lane.ranks)) for lane, loss in best_losses(probes) if lane.num_samples == largest)
        mixed = [grid.runs[pair].ranks for _, pair in probed if pair != key(selection.pick)]
        for number in SWEPT:
            some = [selection.pick, *mixed[: number - 1]]
            found.append(replay.swept(f"best probe and the laws' pick, sweep of {number}", some))
    return found


# Without probes.


def others(cell: Cell, grid: Grid, prices: Prices) -> list[Method]:
    """Fixed ranks, chance, random search, TPE with successive halving, and separate learning rates."""
    runs = list(grid.runs.values())
    space = replace(job_space(cell.job), most_together=len(runs))
    replay = Replay(grid, space, prices)
    ranks = sorted({run.ranks["llm"] for run in runs})
    found = [replay.method(f"uniform rank {rank}", Uniform(rank)) for rank in ranks]
    found.append(_expected("random pair", _mean([grid.regret(run) for run in runs]), 1.0))
    found += [
        _expected(f"random search, {number} runs", _best_of_random(runs, grid, number), float(number))
        for number in (2, 3, 4, 6, 8, 12, 16)
        if number < len(runs)
    ]
    rated = replay.method(f"separate learning rates at rank {UNIFORM_RANK}", SEPARATE_RATES)
    found.append(rated._replace(ranks=None))
    probed = rank_vectors(cell.job.config.lora.grids, corners=True)
    for name, some in (("all pairs", [run.ranks for run in runs]), ("the pairs of the probes", probed)):
        halving = replace(replay, space=replace(space, probed=some))
        found.append(halving.method(f"successive halving of {name}, no probes", HALVING))
    return found + by_tpe(replay)


def _best_of_random(runs: Sequence[Run], grid: Grid, number: int) -> dict[str, float]:
    """Expected regrets of the best of `number` different pairs drawn evenly: exact for the validation loss."""
    ordered = sorted(runs, key=lambda run: run.loss)
    every = math.comb(len(runs), number)
    weights = [math.comb(len(runs) - 1 - place, number - 1) / every for place in range(len(runs))]
    regrets = [grid.regret(run) for run in ordered]
    return {
        name: math.fsum(weight * regret[name] for weight, regret in zip(weights, regrets, strict=True))
        for name in ("regret", "test_regret")
    }


def by_tpe(replay: Replay) -> list[Method]:
    """Optuna's TPE with its asynchronous successive halving, on the curves of the final runs; mean of replays."""
    found = []
    for budget in BUDGETS:
        name = f"TPE and halving, steps of {budget} runs"
        seeded = [replace(replay, space=replace(replay.space, seed=seed)) for seed in range(REPLAYS)]
        methods = [one.method(name, TPE, Budget(budget))._asdict() for one in seeded]
        found.append(_expected(name, _mean(methods), statistics.mean(method["compute"] for method in methods)))
    return found


def _expected(name: str, regrets: Mapping[str, float], compute: float) -> Method:
    """A method by its mean regrets, which has no pick of its own."""
    return Method(name, regrets["regret"], regrets["test_regret"], compute)


def _mean(regrets: Sequence[Mapping[str, float] | Document]) -> dict[str, float]:
    return {name: statistics.mean(regret[name] for regret in regrets) for name in ("regret", "test_regret")}
