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
from evidence_runs import UNIFORM_RANK, Cell, Run
from trials import RULES, records_by

from mars_jax import lora
from mars_jax.errors import NoValidResultError
from mars_jax.flops import evaluation_flops
from mars_jax.halving import halving_schedule, survivors
from mars_jax.laws import Laws, fit_laws
from mars_jax.probe.splice import hybrids
from mars_jax.programs import step_flops
from mars_jax.selection import Selection, candidates_for_sweep, select

Document = dict[str, Any]

SEARCHED = ("vision", "llm")
REPLAYS = 20  # of methods that draw


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

    def probes(self, cell: Cell, rule: str) -> float:
        """The probes that a rule needs, with their looks and hybrids."""
        settings = self._workspace.config.probe
        largest, total = max(settings.num_samples), 0.0
        for lane, rows in zip(cell.lanes, cell.rows, strict=True):
            joint = len(lane.adapted) == len(lane.ranks)
            if not (joint or rule == "loss_fraction"):
                continue
            extra = len(hybrids(SEARCHED)) * sum(any(row["remaining"].values()) for row in rows)
            # The smaller D are read off the same pass, but what remains is read anew.
            steps, looks = (rows[-1]["step"], len(rows) - 1) if lane.num_samples == largest else (0, 0)
            looks += extra if rule == "splice" else 0
            total += self._price(lane.ranks, steps, looks, settings.validation_samples)
        return total

    def _price(self, ranks: Mapping[str, int], steps: float, looks: float, samples: int) -> float:
        workspace = self._workspace
        shapes, batch_size = workspace.shapes, workspace.config.probe.batch_size
        cached = not ranks["vision"]
        read = evaluation_flops(
            workspace.model_config,
            workspace.targets,
            ranks,
            batch_size=batch_size,
            tokens=shapes.max_tokens,
            tiles=shapes.max_tiles,
            supervised=shapes.max_supervised,
            cached_encoder=cached,
        ).total
        batches = workspace.look_batches(samples, batch_size)
        return (steps * step_flops(workspace, ranks, cached_encoder=cached) + looks * batches * read) / self._final


# Ours.


def ours(cell: Cell, grid: Grid, prices: Prices) -> tuple[list[Method], dict[str, Laws]]:
    """The picks by each rule and form, with and without the sweep, and the laws of each rule at all D."""
    found, laws_of = [], {}
    for rule in RULES:
        laws = fitted(cell, rule)
        if laws is None:
            continue
        laws_of[rule] = laws
        search = prices.probes(cell, rule)
        for form in ("chosen form", "power form", *(() if laws.untimed else ("paper",))):
            selection = selected(cell, laws, form)
            found.append(_picked(f"{rule}, {form}", selection, grid, prices, search))
        swept, cost = sweep(selected(cell, laws, "chosen form"), grid, prices)
        run = grid.runs[key(swept)]
        price = search + cost + prices.final(run.ranks)
        found.append(_of_run(f"{rule}, chosen form, sweep", run, grid, price))
    return found + _without_balance(cell, laws_of, grid, prices), laws_of


def fitted(cell: Cell, rule: str) -> Laws | None:
    """The laws by a rule; None where the lanes don't determine Law-P."""
    records = records_by(RULES[rule], cell.workspace, cell.lanes, cell.rows)
    looks = cell.workspace.config.probe.looks_per_doubling
    try:
        return fit_laws(records, key=jax.random.key(0), num_bootstraps=200, measuring_interval=2 ** (1 / looks) - 1)
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
        parameters_per_rank=lora.parameters_per_rank(workspace.targets),
    )


def sweep(selection: Selection, grid: Grid, prices: Prices) -> tuple[Mapping[str, int], float]:
    """Successive halving over the candidates on the final runs' own curves, where the laws leave the pick open."""
    if not selection.needs_sweep():
        return selection.pick, 0.0
    candidates = list(candidates_for_sweep(selection))
    steps = grid.runs[key(candidates[0])].curve[-1][0]
    cost, before = 0.0, 0
    for rung in halving_schedule(len(candidates), steps):
        cost += sum(prices.final(ranks, (rung.steps - before) / steps) for ranks in candidates)
        losses = [_best_until(grid.runs[key(ranks)], rung.steps) for ranks in candidates]
        candidates = [candidates[place] for place in survivors(losses, rung.survivors)]
        before = rung.steps
    # The winner has had its final run.
    return candidates[0], cost - prices.final(candidates[0])


def _best_until(run: Run, step: int) -> float:
    return min(loss for at, loss in run.curve if at <= step)


def _of_run(name: str, run: Run, grid: Grid, compute: float) -> Method:
    return Method(name, **grid.regret(run), compute=compute, ranks=dict(run.ranks))


def _picked(name: str, selection: Selection, grid: Grid, prices: Prices, search: float) -> Method:
    run = grid.runs[key(selection.pick)]
    method = _of_run(name, run, grid, search + prices.final(run.ranks))
    return method._replace(p_best=selection.p_best)


def surface_draws(cell: Cell, vectors: Sequence[Mapping[str, int]], target: int) -> np.ndarray:
    """Losses of rank vectors at D = target by a quadratic surface in place of Law-P, [draws, Q].

    log p is linear in log r and its square of each module, log D, and log r log D, so a module can have its best rank
    inside the grid. Ridge regression, a hundredth of a point on all but the intercept; resamples of (ranks, D) cells.
    """
    joint = [
        (lane, min(row["validation_loss"] for row in rows))
        for lane, rows in zip(cell.lanes, cell.rows, strict=True)
        if len(lane.adapted) == len(lane.ranks)
    ]
    design = _terms([lane.ranks for lane, _ in joint], np.asarray([lane.num_samples for lane, _ in joint]))
    log_loss = np.log([loss for _, loss in joint])
    wanted = _terms(vectors, np.full(len(vectors), target))
    penalty = 0.01 * np.eye(design.shape[1])
    penalty[0, 0] = 1e-9
    rng = np.random.default_rng(0)
    counts = [np.bincount(rng.integers(0, len(joint), len(joint)), minlength=len(joint)) for _ in range(200)]
    solutions = [
        np.linalg.solve(design.T @ (count[:, None] * design) + penalty, design.T @ (count * log_loss))
        for count in counts
    ]
    return np.exp(np.asarray(solutions) @ wanted.T)


def _terms(vectors: Sequence[Mapping[str, int]], num_samples: np.ndarray) -> np.ndarray:
    ranks = np.log(np.asarray([[vector[module] for module in SEARCHED] for vector in vectors]) / 8.0)
    samples = np.log(num_samples / 1024.0)[:, None]
    return np.column_stack([np.ones(len(ranks)), ranks, samples, ranks**2, ranks * samples])


def _without_balance(cell: Cell, laws_of: Mapping[str, Laws], grid: Grid, prices: Prices) -> list[Method]:
    """What remains of the method without Law-C, without Law-P, and without any law."""
    found = []
    vectors = [run.ranks for run in grid.runs.values()]
    target = cell.workspace.target_num_samples()
    search = prices.probes(cell, "drift")
    surface = surface_draws(cell, vectors, target).mean(axis=0)
    by_surface = {key(ranks): float(loss) for ranks, loss in zip(vectors, surface, strict=True)}
    for rule, laws in laws_of.items():
        if rule == "drift":
            predicted = laws.performance.loss_draws(vectors, target).mean(axis=0)
            run = grid.runs[key(vectors[int(np.argmin(predicted))])]
            found.append(_of_run("Law-P alone", run, grid, search + prices.final(run.ranks)))
        selection = selected(cell, laws, "chosen form")
        balances = [(candidate.imbalance, key(candidate.ranks)) for candidate in selection.candidates]
        if not laws.untimed:
            run = grid.runs[min((imbalance, pair) for imbalance, pair in balances if imbalance is not None)[1]]
            price = prices.probes(cell, rule) + prices.final(run.ranks)
            found.append(_of_run(f"{rule}, balance alone", run, grid, price))
        kept = [candidate.ranks for candidate in selection.candidates if candidate.kept]
        run = grid.runs[key(min(kept, key=lambda ranks: by_surface[key(ranks)]))]
        price = prices.probes(cell, rule) + prices.final(run.ranks)
        found.append(_of_run(f"{rule}, quadratic surface", run, grid, price))
    run = grid.runs[min(by_surface, key=lambda ranks: by_surface[ranks])]
    found.append(_of_run("quadratic surface alone", run, grid, search + prices.final(run.ranks)))
    largest = max(lane.num_samples for lane in cell.lanes)
    probed = {
        key(lane.ranks): min(row["validation_loss"] for row in rows)
        for lane, rows in zip(cell.lanes, cell.rows, strict=True)
        if lane.num_samples == largest and len(lane.adapted) == len(lane.ranks)
    }
    run = grid.runs[min(probed, key=lambda ranks: probed[ranks])]
    return [*found, _of_run("best probe of the largest D", run, grid, search + prices.final(run.ranks))]


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
    return found + tpe(grid, prices)


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


def tpe(grid: Grid, prices: Prices) -> list[Method]:
    """Optuna's TPE with its asynchronous successive halving, on the curves of the final runs; mean of replays.

    A pair that is suggested again costs only the steps that it hasn't had.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    ranks = sorted({rank for rank, _ in grid.runs})
    budgets = (2.0, 3.0, 4.0, 6.0, 8.0)
    regrets: dict[float, list[Document]] = {budget: [] for budget in budgets}
    for replay in range(REPLAYS):
        study = optuna.create_study(
            sampler=optuna.samplers.TPESampler(seed=replay, n_startup_trials=4),
            pruner=optuna.pruners.SuccessiveHalvingPruner(min_resource=4, reduction_factor=2),
        )
        spent, done, best = 0.0, dict.fromkeys(grid.runs, 0), None
        reached = dict.fromkeys(budgets)
        for _ in range(200):
            trial = study.ask()
            pair = tuple(trial.suggest_categorical(module, ranks) for module in SEARCHED)
            run = grid.runs[pair]
            steps = run.curve[-1][0]
            for place, (step, loss) in enumerate(run.curve):
                if step > done[pair]:
                    spent += prices.final(run.ranks, (step - done[pair]) / steps)
                    done[pair] = step
                trial.report(loss, place)
                if trial.should_prune():
                    study.tell(trial, state=optuna.trial.TrialState.PRUNED)
                    break
            else:
                study.tell(trial, run.loss)
                best = run if best is None or run.loss < best.loss else best
            for budget in budgets:
                if spent <= budget and best is not None:
                    reached[budget] = best
            if spent > max(budgets):
                break
        for budget, chosen in reached.items():
            if chosen is not None:
                regrets[budget].append(grid.regret(chosen))
    return [
        Method(f"TPE and halving, {budget:g} runs", **_mean(some), compute=budget)
        for budget, some in regrets.items()
        if some
    ]


def _mean(regrets: Sequence[Document]) -> Document:
    return {name: statistics.mean(regret[name] for regret in regrets) for name in ("regret", "test_regret")}
