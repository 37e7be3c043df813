"""Configurations that Law-P in step sizes expects to do well, from final runs so far."""

from collections.abc import Sequence

import numpy as np

from mars_jax.laws.law_steps import LEAST_RUNS, StepLaw, fit_step_law
from mars_jax.search.strategies.base import Space
from mars_jax.search.strategies.octaves import octaves
from mars_jax.search.trainer import Configuration, Curve

_TRUST = 0.5  # share of the law's differences that is believed; near runs correct the rest
_STEP_LENGTH = 1.75  # octaves of step sizes over which runs resemble each other
_LENGTH = 6.0  # octaves of ranks and of rates alone
_NOISE = 0.05  # variance of a run's error, as a share of that between configurations
_MOST = 0.5  # a log loss further above the leader's says no more than that the run is bad


def step_law(curves: Sequence[Curve], space: Space) -> StepLaw | None:
    """The law of final runs so far; None where fewer than three adapt all searched modules."""
    known = _known(curves, space)
    return _fit(known, _behind(known, curves), space) if len(known) >= LEAST_RUNS else None


def proposals(curves: Sequence[Curve], space: Space, number: int) -> list[Configuration]:
    """The configurations, not begun yet, that are expected to end lowest; the best first.

    What is expected is half of what the law says, corrected by a Gaussian process over octaves of step sizes, ranks
    and rates (kriging): near a run that was better or worse than the law expects, so are others. The law orders a space
    from few runs, the correction keeps it from the edges where its form fails.

    Args:
        curves: final runs so far, stopped ones too, from one data order.
        space: to choose from; only configurations that adapt all searched modules are proposed.
        number: how many, at most.
    """
    known = _known(curves, space)
    begun = {curve.configuration.name for curve in curves}
    candidates = [one for one in space.every() if _adapts_all(one, space) and one.name not in begun]
    if len(known) < LEAST_RUNS or not candidates:
        return []
    behind = _behind(known, curves)
    law = _fit(known, behind, space)
    measured = [curve.configuration for curve in known]
    residuals = behind - _TRUST * _expected(law, measured, space)
    center = residuals.mean()
    covariance = _similarity(measured, measured, space) + _NOISE * np.eye(len(measured))
    near = _similarity(candidates, measured, space) @ np.linalg.solve(covariance, residuals - center)
    expected = center + near + _TRUST * _expected(law, candidates, space)
    return [candidates[place] for place in np.argsort(expected, kind="stable")[:number]]


def _known(curves: Sequence[Curve], space: Space) -> list[Curve]:
    return [curve for curve in curves if curve.reason is None and _adapts_all(curve.configuration, space)]


def _adapts_all(configuration: Configuration, space: Space) -> bool:
    return all(configuration.ranks[module] for module in _modules(space))


def _modules(space: Space) -> list[str]:
    """Modules with ranks or rates to choose from."""
    return [module for module in space.grids if module in space.searched or module in space.factors]


def _behind(known: Sequence[Curve], curves: Sequence[Curve]) -> np.ndarray:
    """[N] log losses of runs at their last step, relative to the lowest of all runs at that step."""
    lowest: dict[int, float] = {}
    for curve in curves:
        for point in curve.points:
            if point.alive:
                lowest[point.step] = min(point.validation_loss, lowest.get(point.step, np.inf))
    last = [curve.points[-1] for curve in known]
    return np.minimum([np.log(point.validation_loss / lowest[point.step]) for point in last], _MOST)


def _fit(known: Sequence[Curve], behind: np.ndarray, space: Space) -> StepLaw:
    measured = [curve.configuration for curve in known]
    return fit_step_law(*_ranks_and_rates(measured, space), behind)


def _expected(law: StepLaw, configurations: Sequence[Configuration], space: Space) -> np.ndarray:
    return law.log_loss(*_ranks_and_rates(configurations, space))


def _ranks_and_rates(
    configurations: Sequence[Configuration], space: Space
) -> tuple[dict[str, list[int]], dict[str, list[float]]]:
    modules = _modules(space)
    ranks = {m: [one.ranks[m] for one in configurations] for m in modules}
    rates = {m: [space.rates[m] * one.factors.get(m, 1.0) for one in configurations] for m in modules}
    return ranks, rates


def _similarity(left: Sequence[Configuration], right: Sequence[Configuration], space: Space) -> np.ndarray:
    """[L, R] squared-exponential kernel."""
    first, second = _axes(left, space), _axes(right, space)
    return np.exp(-0.5 * np.sum((first[:, None] - second[None]) ** 2, axis=-1))


def _axes(configurations: Sequence[Configuration], space: Space) -> np.ndarray:
    """Step sizes, ranks and rates in units of their lengths, [Q, n]."""
    ranks, rates = _ranks_and_rates(configurations, space)
    steps = [np.log2(np.multiply(ranks[module], rates[module])) / _STEP_LENGTH for module in ranks]
    return np.concatenate([np.stack(steps, axis=1), octaves(space, configurations) / _LENGTH], axis=1)
