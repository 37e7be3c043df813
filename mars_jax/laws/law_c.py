"""Law-C: convergence time of a module from its rank and the number of samples. Data class, prediction and fit.

    t(r, D) = k * r**gamma * D**delta + E            (Cho et al., arXiv 2603.00720, "Law-C")

Several modules are fitted together in `laws.fit`; convergence times come from `laws.convergence`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import log_ndtr
from numpy.typing import ArrayLike

from mars_jax.errors import DataError, NoValidResultError
from mars_jax.laws.least_squares import device_column, in_blocks, levenberg_marquardt, pad_points
from mars_jax.laws.records import Document

NAMES = ("k", "gamma", "delta", "E")
_RANK_UNIT, _SAMPLE_UNIT = 16.0, 1024.0
_EM_ITERATIONS, _INNER_ITERATIONS, _OFFSETS = 60, 3, 48
# Convergence times lie on a grid of eval points: a spread under 0.1 % is no evidence for another parameter.
_SMALLEST_SPREAD = 1e-3
_AICC_MARGIN = 4.0


@dataclass(frozen=True)
class ConvergenceLaw:
    """A fitted Law-C in raw units: rank, D in samples, t in optimizer steps.

    Attributes:
        k: amplitude, > 0 (steps at rank 1 and one sample).
        gamma: exponent of the rank; negative when larger ranks converge sooner.
        delta: exponent of the number of samples.
        E: offset in steps, >= 0.
        ci: 95 % bootstrap interval of each parameter, by name.
        points: number of points, censored ones included.
        rmse_log: root mean square of log(measured / predicted) over the points that are not censored.
        censored: number of points that are lower bounds only.
        draws: [S, 4] bootstrap draws of (k, gamma, delta, E).
    """

    k: float
    gamma: float
    delta: float
    E: float
    ci: Mapping[str, tuple[float, float]]
    points: int
    rmse_log: float
    censored: int
    draws: np.ndarray = field(compare=False, repr=False)

    def __post_init__(self) -> None:
        """Checks that predictions are real: a negative E or k could make a convergence time negative."""
        if not (self.k > 0 and self.E >= 0 and all(math.isfinite(getattr(self, name)) for name in NAMES)):
            raise DataError(
                f"a convergence law has k={self.k}, gamma={self.gamma}, delta={self.delta}, E={self.E}; "
                "all must be finite, k above 0 and E not below 0. Fit the laws again."
            )

    def log_steps(self, rank: ArrayLike, num_samples: float) -> np.ndarray:
        """Natural log of the convergence time in steps, in the shape of `rank`, at D = `num_samples`."""
        return _log_steps(np.asarray([self.k, self.gamma, self.delta, self.E]), np.asarray(rank), num_samples)

    def log_steps_draws(self, rank: ArrayLike, num_samples: float) -> np.ndarray:
        """`log_steps` of every bootstrap draw: ranks of shape [...] give [S, ...]."""
        rank = np.asarray(rank)
        columns = self.draws.T.reshape(4, -1, *([1] * rank.ndim))
        return _log_steps(columns, rank[None], num_samples)

    def to_json(self) -> Document:
        """The entry of this module under `convergence` in laws.json, without the draws, which have their own key."""
        return {
            **{name: getattr(self, name) for name in NAMES},
            "ci": {name: list(interval) for name, interval in self.ci.items()},
            "points": self.points,
            "rmse_log": self.rmse_log,
            "censored": self.censored,
        }

    @classmethod
    def from_json(cls, entry: Document, draws: np.ndarray) -> "ConvergenceLaw":
        """The inverse of `to_json`, with the [S, 4] draws."""
        ci = {name: (float(low), float(high)) for name, (low, high) in entry["ci"].items()}
        numbers = {name: float(entry[name]) for name in (*NAMES, "rmse_log")}
        return cls(**numbers, ci=ci, points=int(entry["points"]), censored=int(entry["censored"]), draws=draws)


def _log_steps(parameters: np.ndarray, rank: np.ndarray, num_samples: np.ndarray | float) -> np.ndarray:
    k, gamma, delta, offset = parameters
    power = np.log(k) + gamma * np.log(rank) + delta * np.log(num_samples)
    with np.errstate(divide="ignore"):
        return np.logaddexp(power, np.log(offset))


def fit_data_exponent(num_samples: ArrayLike, steps: ArrayLike) -> tuple[float, float]:
    """Fits t = k * D**delta at one rank by least squares of log t, as in the paper's Figure 2(b).

    Args:
        num_samples: [N] samples D.
        steps: [N] convergence times in steps.

    Returns:
        (k in steps, delta).
    """
    delta, log_k = np.polyfit(np.log(np.asarray(num_samples, float)), np.log(np.asarray(steps, float)), 1)
    return float(np.exp(log_k)), float(delta)


def fit_convergence_law(
    module: str,
    ranks: ArrayLike,
    num_samples: ArrayLike,
    steps: ArrayLike,
    censored: ArrayLike,
    *,
    weights: ArrayLike | None = None,
    counts: ArrayLike | None = None,
) -> ConvergenceLaw:
    """Fits Law-C of one module by weighted least squares of log t, with censored points as in a Tobit model.

    A censored point contributes the probability that its time lies beyond its horizon (Tobin 1958), by
    expectation-maximisation: it is imputed by the mean of the truncated normal, then the law is refitted. E is 0 unless
    the corrected AIC of the form with E >= 0 is lower by more than 4. Bootstraps use the form chosen on all points.

    Args:
        module: name of the module, for messages.
        ranks: [N] rank of the module, >= 1.
        num_samples: [N] samples D.
        steps: [N] convergence times in optimizer steps; the horizon where censored.
        censored: [N] True where the time is a lower bound.
        weights: [N] relative inverse variances of log t; None: equal.
        counts: [S, N] multiplicity of each point in each bootstrap resample; None: no intervals.

    Returns:
        The law.

    Raises:
        NoValidResultError: the measured points do not determine the parameters; the message names what to add.
    """
    rank = np.asarray(ranks, np.float64)
    samples, time = np.asarray(num_samples, np.float64), np.asarray(steps, np.float64)
    is_censored = np.asarray(censored, bool)
    check_design(module, rank, samples, is_censored)
    weight = np.ones_like(time) if weights is None else np.asarray(weights, np.float64)
    resamples = np.zeros((0, len(time))) if counts is None else np.asarray(counts, np.float64)

    # Centring the logs makes the columns nearly orthogonal; the units are put back below.
    log_rank, log_samples = np.log(rank / _RANK_UNIT), np.log(samples / _SAMPLE_UNIT)
    rank_mean, samples_mean = log_rank.mean(), log_samples.mean()
    time_mean = np.log(time).mean()
    points = _Points(
        x=device_column(log_rank - rank_mean),
        d=device_column(log_samples - samples_mean),
        y=device_column(np.log(time) - time_mean),
        weight=device_column(weight / weight.mean()),
        censored=device_column(is_censored) > 0,
    )
    rows = pad_points(np.concatenate([np.ones((1, len(time))), resamples]).T, 0.0).T
    # E is at most the shortest measured time.
    largest = jnp.float32(np.exp(np.log(time[~is_censored]).min() - time_mean))
    with_offset, plain = partial(_fit_rows, points, largest), partial(_fit_rows_without_offset, points)
    aicc = [in_blocks(fit, rows[:1])[0, 4] for fit in (with_offset, plain)]
    fitted = in_blocks(with_offset if aicc[0] < aicc[1] - _AICC_MARGIN else plain, rows)

    intercept, gamma, delta, scaled_offset = fitted[:, :4].T
    log_k = intercept + time_mean - gamma * (rank_mean + math.log(_RANK_UNIT))
    log_k = log_k - delta * (samples_mean + math.log(_SAMPLE_UNIT))
    parameters = np.stack([np.exp(log_k), gamma, delta, scaled_offset * np.exp(time_mean)], axis=1)
    residuals = np.log(time) - _log_steps(parameters[0], rank, samples)
    draws = parameters[1:]
    k, gamma, delta, offset = map(float, parameters[0])
    return ConvergenceLaw(
        k=k,
        gamma=gamma,
        delta=delta,
        E=offset,
        ci=percentile_intervals(NAMES, draws),
        points=len(time),
        rmse_log=float(np.sqrt(np.mean(residuals[~is_censored] ** 2))),
        censored=int(is_censored.sum()),
        draws=draws,
    )


def percentile_intervals(names: tuple[str, ...], draws: np.ndarray) -> dict[str, tuple[float, float]]:
    """95 % percentile intervals of [S, n] draws by name; empty without draws."""
    if not len(draws):
        return {}
    low, high = np.percentile(draws, [2.5, 97.5], axis=0)
    return {name: (float(a), float(b)) for name, a, b in zip(names, low, high, strict=True)}


def check_design(module: str, ranks: np.ndarray, num_samples: np.ndarray, censored: np.ndarray) -> None:
    """Checks that the points determine k, gamma and delta.

    Args:
        module: name of the module, for messages.
        ranks: [N] ranks of the module.
        num_samples: [N] samples D.
        censored: [N] True where the time is a lower bound.

    Raises:
        NoValidResultError: they do not; the message names the column at fault and what to add.
    """
    rank, samples = ranks[~censored], num_samples[~censored]
    where = f"Law-C of module {module!r}"
    size = f"{len(ranks)} points, {int(censored.sum())} of them censored"
    if len(np.unique(rank)) == 1:
        raise NoValidResultError(
            f"{where}: every converged point has rank {rank[0]:g} ({size}), so the rank exponent gamma cannot be "
            "fitted. Add probe lanes with at least one other rank, or longer ones if those are censored."
        )
    if len(np.unique(samples)) == 1:
        raise NoValidResultError(
            f"{where}: every converged point has D = {samples[0]:g} samples ({size}), so the data exponent delta "
            "cannot be fitted. Add probe lanes with at least one other number of samples, or longer ones if those "
            "are censored."
        )
    if len(rank) < 3:
        raise NoValidResultError(
            f"{where}: {len(rank)} converged points for 3 parameters ({size}). Add probe lanes, or let them run longer."
        )
    columns = np.stack([np.ones_like(rank), np.log(rank), np.log(samples)], axis=1)
    if np.linalg.matrix_rank(columns - np.mean(columns, axis=0) * [0, 1, 1], tol=1e-6) < 3:
        raise NoValidResultError(
            f"{where}: ranks and numbers of samples change together ({size}), so gamma and delta cannot be separated. "
            "Add a probe lane with one of these ranks at another number of samples."
        )


class _Points(NamedTuple):
    """Centred logs of rank, samples and steps, all [N]; weights with mean 1; censored."""

    x: jax.Array
    d: jax.Array
    y: jax.Array
    weight: jax.Array
    censored: jax.Array


def _log_time(theta: jax.Array, points: _Points) -> jax.Array:
    return jnp.log(jnp.exp(theta[0] + theta[1] * points.x + theta[2] * points.d) + theta[3])


@jax.jit
def _fit_rows(points: _Points, largest_offset: jax.Array, counts: jax.Array) -> jax.Array:
    """[S, N] counts -> [S, 5]: intercept, gamma, delta, scaled E, and the corrected AIC."""
    return jax.vmap(partial(_fit_row, points, largest_offset))(counts)


@jax.jit
def _fit_rows_without_offset(points: _Points, counts: jax.Array) -> jax.Array:
    """`_fit_rows` with E = 0: every refit is linear, in closed form."""
    return jax.vmap(partial(_fit_row_without_offset, points))(counts)


def _fit_row_without_offset(points: _Points, counts: jax.Array) -> jax.Array:
    weight = points.weight * counts

    def refit(theta: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
        theta = jnp.append(_linear_fit(points.x, points.d, target, weight), 0.0)
        return theta, jnp.sum(weight * (target - _log_time(theta, points)) ** 2)

    measured = jnp.where(points.censored, 0.0, weight)
    theta = jnp.append(_linear_fit(points.x, points.d, points.y, measured), 0.0)
    cost = jnp.sum(measured * (points.y - _log_time(theta, points)) ** 2)
    theta, log_likelihood = _expectation_maximisation(points, counts, theta, cost, refit)
    return jnp.append(theta, _aicc(log_likelihood, jnp.sum(counts), 4.0))


def _fit_row(points: _Points, largest_offset: jax.Array, counts: jax.Array) -> jax.Array:
    weight = points.weight * counts
    measured = jnp.where(points.censored, 0.0, weight)

    # Start: the closed form on log(t - E) of the measured points at each E of a grid, compared by the error of log t.
    def at_offset(offset: jax.Array) -> tuple[jax.Array, jax.Array]:
        left = jnp.maximum(1.0 - offset * jnp.exp(-points.y), 0.02)
        theta = _linear_fit(points.x, points.d, points.y + jnp.log(left), measured * left**2)
        theta = jnp.append(theta, offset)
        return theta, jnp.sum(measured * (points.y - _log_time(theta, points)) ** 2)

    starts, costs = jax.vmap(at_offset)(jnp.linspace(0.0, 0.98, _OFFSETS) * largest_offset)
    lower = jnp.array([-jnp.inf, -jnp.inf, -jnp.inf, 0.0])
    upper = jnp.array([jnp.inf, jnp.inf, jnp.inf, 1.0]) * jnp.where(jnp.arange(4) == 3, largest_offset, 1.0)

    def refit(theta: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
        def residual(theta: jax.Array) -> jax.Array:
            return jnp.sqrt(weight) * (target - _log_time(theta, points))

        return levenberg_marquardt(residual, theta, lower, upper, _INNER_ITERATIONS)

    start = starts[jnp.argmin(costs)]
    theta, log_likelihood = _expectation_maximisation(points, counts, start, jnp.min(costs), refit)
    return jnp.append(theta, _aicc(log_likelihood, jnp.sum(counts), 5.0))


def _expectation_maximisation(
    points: _Points,
    counts: jax.Array,
    theta: jax.Array,
    cost: jax.Array,
    refit: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]],
) -> tuple[jax.Array, jax.Array]:
    """Parameters [4] and log-likelihood, from a start whose weighted sum of squares over measured points is `cost`."""
    weight = points.weight * counts
    noise = 1.0 / jnp.sqrt(jnp.maximum(points.weight, 1e-12))

    def em(state: tuple[jax.Array, jax.Array], _: None) -> tuple[tuple[jax.Array, jax.Array], None]:
        theta, spread = state
        mean, sigma = _log_time(theta, points), spread * noise
        z = (points.y - mean) / sigma
        hazard = jnp.exp(-0.5 * z**2 - 0.5 * jnp.log(2 * jnp.pi) - log_ndtr(-z))
        target = jnp.where(points.censored, mean + sigma * hazard, points.y)
        imputed_variance = jnp.where(points.censored, sigma**2 * jnp.clip(1.0 + z * hazard - hazard**2, 0.0, 1.0), 0.0)
        theta, cost = refit(theta, target)
        spread = jnp.sqrt((cost + jnp.sum(weight * imputed_variance)) / jnp.sum(counts))
        return (theta, jnp.maximum(spread, _SMALLEST_SPREAD)), None

    spread = jnp.sqrt(cost / jnp.sum(jnp.where(points.censored, 0.0, counts)))
    start = (theta, jnp.maximum(spread, _SMALLEST_SPREAD))
    (theta, spread), _ = jax.lax.scan(em, start, None, length=_EM_ITERATIONS)
    z = (points.y - _log_time(theta, points)) / (spread * noise)
    log_density = -0.5 * z**2 - jnp.log(spread * noise) - 0.5 * jnp.log(2 * jnp.pi)
    return theta, jnp.sum(counts * jnp.where(points.censored, log_ndtr(-z), log_density))


def _aicc(log_likelihood: jax.Array, points: jax.Array, parameters: float) -> jax.Array:
    """Corrected AIC; `parameters` counts the spread. Infinite where too few points are left for an offset."""
    freedom = points - parameters - 1.0
    aicc = 2 * parameters - 2 * log_likelihood + 2 * parameters * (parameters + 1) / jnp.maximum(freedom, 1e-9)
    return jnp.where((parameters > 4) & (freedom <= 0), jnp.inf, aicc)


def _linear_fit(x: jax.Array, d: jax.Array, y: jax.Array, weight: jax.Array) -> jax.Array:
    """Weighted least squares of y on (1, x, d), columns centred by their weighted means; [3]."""
    total = jnp.sum(weight)

    def centred(column: jax.Array) -> tuple[jax.Array, jax.Array]:
        mean = jnp.sum(weight * column) / total
        return mean, column - mean

    (x_mean, x), (d_mean, d), (y_mean, y) = centred(x), centred(d), centred(y)
    xx, dd, xd = jnp.sum(weight * x * x), jnp.sum(weight * d * d), jnp.sum(weight * x * d)
    xy, dy = jnp.sum(weight * x * y), jnp.sum(weight * d * y)
    determinant = jnp.maximum(xx * dd - xd**2, 1e-12)
    gamma, delta = (dd * xy - xd * dy) / determinant, (xx * dy - xd * xy) / determinant
    return jnp.stack([y_mean - gamma * x_mean - delta * d_mean, gamma, delta])
