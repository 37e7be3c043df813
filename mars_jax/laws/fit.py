"""Fits both laws to the records of the probe lanes, with joint bootstrap draws; reads and writes laws.json.

Law-C of one module is fitted in `law_c`, Law-P in `law_p`.
"""

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import numpy as np

from mars_jax.errors import ConfigError, DataError, NoValidResultError
from mars_jax.laws.law_c import ConvergenceLaw, ConvergenceTimes, fit_convergence_law
from mars_jax.laws.law_p import PerformanceLaw, can_fit, choose_form, fit_performance_law, parameter_names
from mars_jax.laws.records import Document, LaneRecord
from mars_jax.laws.resamples import RunResamples, resample_runs

_FEWEST_DRAWS, _MOST_DRAWS_IN_JSON = 20, 200
# Spread of log t between seeds: assumed where no cell has two seeds, and the least where some have.
_USUAL_SEED_SPREAD, _LEAST_SEED_SPREAD = 0.1, 0.01


@dataclass(frozen=True)
class Laws:
    """The fitted laws of a run.

    Attributes:
        convergence: Law-C of each searched module (more than one rank among the lanes) whose times determine it.
        untimed: each other searched module -> why its Law-C is not determined, and what to add; empty where the lanes
            have no convergence times.
        performance: Law-P in the form to select with; None where no lane adapts all modules.
        multiplicative: Law-P in the paper's form; the same object when `performance` has that form.
        diverged: number of lanes left out because they diverged.

    Row s of every `draws` array comes from the same resampled runs.
    """

    convergence: Mapping[str, ConvergenceLaw]
    untimed: Mapping[str, str]
    performance: PerformanceLaw | None
    multiplicative: PerformanceLaw | None
    diverged: int

    def to_json(self) -> Document:
        """The document laws.json; `draws` holds the first 200 bootstrap draws in full precision."""
        other = None if self.multiplicative is self.performance else self.multiplicative
        return {
            "convergence": {module: law.to_json() for module, law in self.convergence.items()},
            "untimed": dict(self.untimed),
            "performance": None if self.performance is None else self.performance.to_json(),
            "multiplicative": None if other is None else other.to_json(),
            "diverged": self.diverged,
            "draws": {
                "convergence": {module: _columns(law.names, law.draws) for module, law in self.convergence.items()},
                "performance": None if self.performance is None else _performance_columns(self.performance),
                "multiplicative": None if other is None else _performance_columns(other),
            },
        }

    @classmethod
    def from_json(cls, document: Document) -> "Laws":
        """The inverse of `to_json`, except for draws beyond the first 200.

        Raises:
            DataError: a key is missing.
        """
        try:
            draws = document["draws"]
            convergence = {
                module: ConvergenceLaw.from_json(entry, _rows(draws["convergence"][module]))
                for module, entry in document["convergence"].items()
            }
            performance = None
            if document["performance"] is not None:
                performance = PerformanceLaw.from_json(document["performance"], _rows(draws["performance"]))
            multiplicative = performance
            if document["multiplicative"] is not None:
                multiplicative = PerformanceLaw.from_json(document["multiplicative"], _rows(draws["multiplicative"]))
            untimed = dict(document["untimed"])
            return cls(convergence, untimed, performance, multiplicative, int(document["diverged"]))
        except KeyError as error:
            raise DataError(
                f"laws.json has no key {error}. Fit the laws again (`mars fit`) to write it anew."
            ) from None


def determined(law: PerformanceLaw | None) -> PerformanceLaw:
    """A Law-P of `Laws`.

    Raises:
        NoValidResultError: the probes determine none.
    """
    if law is None:
        raise NoValidResultError(
            "there is no Law-P: no probe adapts all modules together. Probe with a strategy that picks by it "
            "(selection.method: laws, paper or best_probes)."
        )
    return law


def _columns(names: Sequence[str], draws: np.ndarray) -> dict[str, list[float]]:
    return {name: column.tolist() for name, column in zip(names, draws[:_MOST_DRAWS_IN_JSON].T, strict=True)}


def _performance_columns(law: PerformanceLaw) -> dict[str, list[float]]:
    return _columns(parameter_names(law.form, law.modules), law.draws)


def _rows(columns: Mapping[str, Sequence[float]]) -> np.ndarray:
    return np.array(list(columns.values()), np.float64).T


def fit_laws(
    lanes: Sequence[LaneRecord],
    *,
    key: jax.Array,
    num_bootstraps: int = 200,
    measuring_interval: float = 0.05,
    huber: float | None = None,
) -> Laws:
    """Fits Law-C of every searched module and Law-P to probe lanes.

    A module is searched when the lanes have more than one rank of it. Its Law-C is fitted to every lane with a
    convergence time (or a censored one) for it, with its learning rates where they vary. Law-P knows no learning rates:
    it is fitted to the lanes that adapt all modules, so not to those with a rank of 0 (frozen), at the most frequent
    rates. Lanes that diverged are left out and counted. Points of Law-C are weighted by
    1 / (sigma_seed**2 + (interval / t)**2 / 12): the spread between seeds and the rounding to the grid of eval points.

    Args:
        lanes: records of probes/lanes.jsonl (`read_records`).
        key: random key of the bootstrap, which resamples whole runs among those that adapt the same modules and have
            lanes of the same D (`laws.resamples`). Lanes whose run is not known count as one run if they differ in D
            only.
        num_bootstraps: resamples, at least 20.
        measuring_interval: steps between eval points as a share of t, for lanes without `eval_interval`.
        huber: relative error of a loss beyond which Huber's loss is linear (see `fit_performance_law`); None: squares.

    Returns:
        The laws, with intervals and draws. A module whose lanes converged at too few ranks or sizes, or in too few
        runs, has no Law-C; the losses of those lanes still count for Law-P. Without lanes that adapt all modules there
        is no Law-P.

    Raises:
        NoValidResultError: the lanes do not determine Law-P or its intervals, or determine neither law; the message
            names what to add.
    """
    if num_bootstraps < _FEWEST_DRAWS:
        raise ConfigError(f"num_bootstraps is {num_bootstraps}; allowed: {_FEWEST_DRAWS} or more.")
    if not measuring_interval > 0:
        raise ConfigError(f"measuring_interval is {measuring_interval}; allowed: a share of t above 0, such as 0.05.")
    kept = [lane for lane in lanes if lane.status != "diverged"]
    modules = list(dict.fromkeys(module for lane in kept for module, rank in lane.ranks.items() if rank > 0))
    ranks = {module: np.array([lane.ranks.get(module, 0) for lane in kept]) for module in modules}
    searched = [module for module in modules if len(np.unique(ranks[module][ranks[module] > 0])) > 1]
    if not searched:
        ranks_by_module = {module: sorted({int(r) for r in ranks[module] if r > 0}) for module in modules}
        raise NoValidResultError(
            f"no module has two ranks among the {len(kept)} lanes that did not diverge (of {len(lanes)}; ranks seen: "
            f"{ranks_by_module}), so there is nothing to search. Probe at least two ranks of a module."
        )

    samples = np.array([lane.num_samples for lane in kept])
    every_rank = np.stack([ranks[module] for module in modules], axis=1)
    times = {module: _convergence_times(module, kept) for module in searched}
    losses = np.array([np.nan if lane.best_loss is None else lane.best_loss for lane in kept], np.float64)
    joint = np.all(every_rank > 0, axis=1) & np.isfinite(losses)
    timed = any(lane.convergence_steps for lane in kept)
    if joint.any():
        joint &= _at_usual_rates(kept, joint)
    elif not timed:
        raise NoValidResultError(
            f"Law-P: none of the {len(kept)} lanes adapts all of {', '.join(modules)} with a finite loss. "
            "Add probe lanes that adapt them together."
        )

    # Only runs whose lanes serve the same laws can exchange residuals.
    serves = np.stack([joint, *(np.isfinite(time) for time, _ in times.values())], axis=1).tolist()
    kinds = [(lane.num_samples, lane.trained, *laws) for lane, laws in zip(kept, serves, strict=True)]
    resamples = resample_runs(key, [_run(lane) for lane in kept], kinds, num_bootstraps)

    def times_of(module: str) -> tuple[ConvergenceTimes, RunResamples]:
        time, censored = times[module]
        used = np.isfinite(time)
        weights = _weights(kept, time, used & ~censored, every_rank, samples, measuring_interval)
        measured = ConvergenceTimes(
            ranks[module][used],
            samples[used],
            time[used],
            censored[used],
            rates=_rates(module, kept, used),
            weights=weights[used],
            horizons=np.array([lane.steps for lane in kept])[used],
        )
        return measured, resamples.of(used)

    # Without a convergence rule no lane has a time, and no Law-C is missing.
    convergence, untimed = _convergence_laws({module: times_of(module) for module in (searched if timed else [])})
    performance, power = None, None
    if joint.any():
        points = {module: ranks[module][joint] for module in searched}, samples[joint], losses[joint]
        performance, power = _performance_laws(points, resamples.of(joint), huber)
    return Laws(convergence, untimed, performance, power, len(lanes) - len(kept))


def _convergence_laws(
    times: Mapping[str, tuple[ConvergenceTimes, RunResamples]],
) -> tuple[dict[str, ConvergenceLaw], dict[str, str]]:
    """Law-C of the modules whose times determine it, and why those of the others don't."""
    convergence, untimed = {}, {}
    for module, (measured, resamples) in times.items():
        try:
            convergence[module] = fit_convergence_law(module, measured, resamples)
        except NoValidResultError as error:
            untimed[module] = str(error)
    return convergence, untimed


def _performance_laws(
    points: tuple[Mapping[str, np.ndarray], np.ndarray, np.ndarray], resamples: RunResamples, huber: float | None
) -> tuple[PerformanceLaw, PerformanceLaw]:
    """The form of Law-P to select ranks with, and the power form, of ranks by module, samples and losses."""
    fit = partial(fit_performance_law, huber=huber)
    power = fit("power", *points, resamples=resamples)
    overfit = fit("power_overfit", *points) if can_fit("power_overfit", *points[:2]) else None
    performance = choose_form(power, overfit)
    if performance is overfit:
        try:
            performance = fit("power_overfit", *points, resamples=resamples)
        except NoValidResultError:  # Its more parameters leave too few runs for an interval.
            performance = power
    return performance, power


def _run(lane: LaneRecord) -> Hashable:
    """What lanes of one run have in common."""
    return lane.run or (tuple(sorted(lane.ranks.items())), lane.seed)


def _at_usual_rates(lanes: Sequence[LaneRecord], joint: np.ndarray) -> np.ndarray:
    """[N] whether a lane has the learning rates that most of the joint ones have."""
    rates = [tuple(sorted(lane.learning_rate.items())) for lane in lanes]
    counts = Counter(rate for rate, is_joint in zip(rates, joint, strict=True) if is_joint)
    usual = counts.most_common(1)[0][0]
    return np.array([rate == usual for rate in rates])


def _rates(module: str, lanes: Sequence[LaneRecord], used: np.ndarray) -> np.ndarray | None:
    """Learning rates of the module in the lanes that are used; None where a record has none."""
    rates = [lane.learning_rate.get(module) for lane, is_used in zip(lanes, used, strict=True) if is_used]
    return None if None in rates else np.array(rates, np.float64)


def _convergence_times(module: str, lanes: Sequence[LaneRecord]) -> tuple[np.ndarray, np.ndarray]:
    """[N] steps of the module in each lane (the horizon where censored, NaN where it has none) and [N] censored."""
    censored = np.array([lane.ranks.get(module, 0) > 0 and bool(lane.censored.get(module)) for lane in lanes])
    time = np.full(len(lanes), np.nan)
    for index, lane in enumerate(lanes):
        steps = lane.convergence_steps.get(module)
        if lane.ranks.get(module, 0) > 0 and (steps is not None or censored[index]):
            time[index] = lane.steps if steps is None else steps
    return time, censored


def _weights(
    lanes: Sequence[LaneRecord],
    time: np.ndarray,
    measured: np.ndarray,
    ranks: np.ndarray,
    samples: np.ndarray,
    measuring_interval: float,
) -> np.ndarray:
    """[N] inverse variances of log t: pooled variance between seeds of a cell, and a uniform error of one interval."""
    _, cells = np.unique(np.column_stack([ranks, samples])[measured], axis=0, return_inverse=True)
    cells, log_time = cells.reshape(-1), np.log(time[measured])
    sizes = np.bincount(cells)
    means = np.bincount(cells, log_time) / sizes
    freedom = len(cells) - len(sizes)
    spread = np.sqrt(np.sum((log_time - means[cells]) ** 2) / freedom) if freedom else _USUAL_SEED_SPREAD
    relative = np.array([np.nan if x.eval_interval is None else x.eval_interval for x in lanes], np.float64) / time
    relative = np.where(np.isfinite(relative), relative, measuring_interval)
    return 1.0 / (max(spread, _LEAST_SEED_SPREAD) ** 2 + relative**2 / 12.0)
