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
from mars_jax.laws.least_squares import device_column, in_blocks, levenberg_marquardt
from mars_jax.laws.records import Document
from mars_jax.laws.resamples import RunResamples, percentile_intervals

NAMES = ("k", "gamma", "delta", "E")
_RANK_UNIT, _SAMPLE_UNIT = 16.0, 1024.0
_EM_ITERATIONS, _INNER_ITERATIONS, _OFFSETS = 60, 3, 48
# Convergence times lie on a grid of eval points: a spread under 0.1 % is no evidence for another parameter.
_SMALLEST_SPREAD = 1e-3
_AICC_MARGIN = 4.0
# Columns of a fitted row, after the parameters.
_AICC, _SPREAD = 4, 5


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
    horizons: ArrayLike | None = None,
    resamples: RunResamples | None = None,
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
        horizons: [N] steps beyond which times are censored, in resamples too; None: those of censored points are
            `steps`, and the others have none.
        resamples: bootstrap resamples of the N points; None: no intervals.

    Returns:
        The law.

    Raises:
        NoValidResultError: the measured points do not determine the parameters, or the runs not the intervals; the
            message names what to add.
    """
    rank = np.asarray(ranks, np.float64)
    samples, time = np.asarray(num_samples, np.float64), np.asarray(steps, np.float64)
    is_censored = np.asarray(censored, bool)
    check_design(module, rank, samples, is_censored)
    weight = np.ones_like(time) if weights is None else np.asarray(weights, np.float64)

    # Centring the logs makes the columns nearly orthogonal; the units are put back below.
    log_rank, log_samples = np.log(rank / _RANK_UNIT), np.log(samples / _SAMPLE_UNIT)
    rank_mean, samples_mean = log_rank.mean(), log_samples.mean()
    time_mean = np.log(time).mean()
    points = _Points(
        x=device_column(log_rank - rank_mean),
        d=device_column(log_samples - samples_mean),
        weight=device_column(weight / weight.mean()),
        known=device_column(np.ones_like(time)),
    )
    log_time = np.log(time) - time_mean
    # E is at most the shortest measured time.
    largest = jnp.float32(np.exp(log_time[~is_censored].min()))
    forms = partial(_fit_rows, points, largest), partial(_fit_rows_without_offset, points)
    columns = np.stack([np.ones_like(time), log_rank - rank_mean, log_samples - samples_mean], axis=1)
    with_offset, plain = (in_blocks(form, log_time[None], is_censored[None]) for form in forms)
    use_offset = with_offset[0, _AICC] < plain[0, _AICC] - _AICC_MARGIN
    fitted = with_offset if use_offset else plain
    if resamples is not None:
        errors = _errors(fitted[0], columns, log_time, is_censored, weight / weight.mean(), resamples)
        if errors is None:
            raise NoValidResultError(
                f"Law-C of module {module!r}: {resamples.number} runs are too few to know how much runs differ, so it "
                "has no interval. Add probe lanes at other ranks, or seeds."
            )
        last = np.where(is_censored, log_time, np.inf) if horizons is None else np.log(horizons) - time_mean
        moved = _centred_log_time(fitted[0], columns) + errors
        late = moved > last
        late[np.sum(~late, axis=1) < columns.shape[1]] = is_censored  # Too few times to fit.
        rows = np.where(late, np.where(np.isfinite(last), last, 0.0), moved), late
        fitted = np.concatenate([fitted, in_blocks(forms[0] if use_offset else forms[1], *rows)])

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


def _centred_log_time(theta: np.ndarray, columns: np.ndarray) -> np.ndarray:
    return np.log(np.exp(columns @ theta[:3]) + theta[3])


def _errors(
    fitted: np.ndarray,
    columns: np.ndarray,
    log_time: np.ndarray,
    censored: np.ndarray,
    weight: np.ndarray,
    resamples: RunResamples,
) -> np.ndarray | None:
    """[S, N] errors of log t in the resamples of a fit; None where the runs are too few."""
    expected = _centred_log_time(fitted, columns)
    spread = fitted[_SPREAD] / np.sqrt(weight)
    # Of a censored point the residual is not known; its mean square beyond the horizon is.
    z = (log_time - expected) / spread
    hazard = np.exp(-0.5 * z**2 - 0.5 * np.log(2 * np.pi) - np.asarray(log_ndtr(-z), np.float64))
    beyond = spread * np.sqrt(np.maximum(1.0 + z * hazard, 0.0))
    residuals = np.where(censored, beyond, log_time - expected)
    offset = fitted[3]
    jacobian = columns * (1.0 - offset * np.exp(-expected))[:, None]
    if offset > 0:
        jacobian = np.column_stack([jacobian, np.exp(-expected)])
    root = np.sqrt(weight)
    errors = resamples.errors(residuals * root, jacobian * root[:, None])
    return None if errors is None else errors / root


class _Points(NamedTuple):
    """Centred logs of rank and samples, all [N]; weights with mean 1; 1 for points, 0 for padding."""

    x: jax.Array
    d: jax.Array
    weight: jax.Array
    known: jax.Array


def _log_time(theta: jax.Array, points: _Points) -> jax.Array:
    return jnp.log(jnp.exp(theta[0] + theta[1] * points.x + theta[2] * points.d) + theta[3])


@jax.jit
def _fit_rows(points: _Points, largest_offset: jax.Array, log_times: jax.Array, censored: jax.Array) -> jax.Array:
    """[S, N] centred log t -> [S, 6]: intercept, gamma, delta, scaled E, the corrected AIC, and the spread."""
    return jax.vmap(partial(_fit_row, points, largest_offset))(log_times, censored > 0)


@jax.jit
def _fit_rows_without_offset(points: _Points, log_times: jax.Array, censored: jax.Array) -> jax.Array:
    """`_fit_rows` with E = 0: every refit is linear, in closed form."""
    return jax.vmap(partial(_fit_row_without_offset, points))(log_times, censored > 0)


def _fit_row_without_offset(points: _Points, y: jax.Array, censored: jax.Array) -> jax.Array:
    weight = points.weight

    def refit(theta: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
        theta = jnp.append(_linear_fit(points.x, points.d, target, weight), 0.0)
        return theta, jnp.sum(weight * (target - _log_time(theta, points)) ** 2)

    measured = jnp.where(censored, 0.0, weight)
    theta = jnp.append(_linear_fit(points.x, points.d, y, measured), 0.0)
    cost = jnp.sum(measured * (y - _log_time(theta, points)) ** 2)
    return _expectation_maximisation(points, y, censored, (theta, cost), refit, 4.0)


def _fit_row(points: _Points, largest_offset: jax.Array, y: jax.Array, censored: jax.Array) -> jax.Array:
    weight = points.weight
    measured = jnp.where(censored, 0.0, weight)

    # Start: the closed form on log(t - E) of the measured points at each E of a grid, compared by the error of log t.
    def at_offset(offset: jax.Array) -> tuple[jax.Array, jax.Array]:
        left = jnp.maximum(1.0 - offset * jnp.exp(-y), 0.02)
        theta = _linear_fit(points.x, points.d, y + jnp.log(left), measured * left**2)
        theta = jnp.append(theta, offset)
        return theta, jnp.sum(measured * (y - _log_time(theta, points)) ** 2)

    starts, costs = jax.vmap(at_offset)(jnp.linspace(0.0, 0.98, _OFFSETS) * largest_offset)
    lower = jnp.array([-jnp.inf, -jnp.inf, -jnp.inf, 0.0])
    upper = jnp.array([jnp.inf, jnp.inf, jnp.inf, 1.0]) * jnp.where(jnp.arange(4) == 3, largest_offset, 1.0)

    def refit(theta: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
        def residual(theta: jax.Array) -> jax.Array:
            return jnp.sqrt(weight) * (target - _log_time(theta, points))

        return levenberg_marquardt(residual, theta, lower, upper, _INNER_ITERATIONS)

    start = starts[jnp.argmin(costs)], jnp.min(costs)
    return _expectation_maximisation(points, y, censored, start, refit, 5.0)


def _expectation_maximisation(
    points: _Points,
    y: jax.Array,
    censored: jax.Array,
    start: tuple[jax.Array, jax.Array],
    refit: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]],
    parameters: float,
) -> jax.Array:
    """A row of `_fit_rows`, from parameters and their weighted sum of squares over measured points."""
    theta, cost = start
    noise = 1.0 / jnp.sqrt(jnp.maximum(points.weight, 1e-12))

    def em(state: tuple[jax.Array, jax.Array], _: None) -> tuple[tuple[jax.Array, jax.Array], None]:
        theta, spread = state
        mean, sigma = _log_time(theta, points), spread * noise
        z = (y - mean) / sigma
        hazard = jnp.exp(-0.5 * z**2 - 0.5 * jnp.log(2 * jnp.pi) - log_ndtr(-z))
        target = jnp.where(censored, mean + sigma * hazard, y)
        imputed_variance = jnp.where(censored, sigma**2 * jnp.clip(1.0 + z * hazard - hazard**2, 0.0, 1.0), 0.0)
        theta, cost = refit(theta, target)
        spread = jnp.sqrt((cost + jnp.sum(points.weight * imputed_variance)) / jnp.sum(points.known))
        return (theta, jnp.maximum(spread, _SMALLEST_SPREAD)), None

    spread = jnp.sqrt(cost / jnp.sum(jnp.where(censored, 0.0, points.known)))
    state = (theta, jnp.maximum(spread, _SMALLEST_SPREAD))
    (theta, spread), _ = jax.lax.scan(em, state, None, length=_EM_ITERATIONS)
    z = (y - _log_time(theta, points)) / (spread * noise)
    log_density = -0.5 * z**2 - jnp.log(spread * noise) - 0.5 * jnp.log(2 * jnp.pi)
    log_likelihood = jnp.sum(points.known * jnp.where(censored, log_ndtr(-z), log_density))
    aicc = _aicc(log_likelihood, jnp.sum(points.known), parameters)
    return jnp.concatenate([theta, jnp.stack([aicc, spread])])


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
