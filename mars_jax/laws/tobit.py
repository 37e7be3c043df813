"""Censored least squares of log t (a Tobit model) for Law-C, on the device, for a batch of data sets.

A censored point contributes the probability that its time lies beyond its horizon (Tobin 1958), by
expectation-maximisation: it is imputed by the mean of the truncated normal, then the law is refitted.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import log_ndtr

from mars_jax.laws.least_squares import levenberg_marquardt

AICC, SPREAD = -2, -1
"""Columns of a fitted row, after the parameters."""

_EM_ITERATIONS, _INNER_ITERATIONS, _OFFSETS = 60, 3, 48
# Convergence times lie on a grid of eval points: a spread under 0.1 % is no evidence for another parameter.
_SMALLEST_SPREAD = 1e-3
_FAR_OUT = 20.0  # standard deviations beyond which float32 has no digits left for the normal distribution's tail


class Points(NamedTuple):
    """Centred logs of what times depend on, [N, n]; [N] weights with mean 1, and 1 for points, 0 for padding."""

    columns: jax.Array
    weight: jax.Array
    known: jax.Array


def _log_time(theta: jax.Array, points: Points) -> jax.Array:
    return jnp.log(jnp.exp(theta[0] + points.columns @ theta[1:-1]) + theta[-1])


@jax.jit
def fit_rows(points: Points, largest_offset: jax.Array, log_times: jax.Array, censored: jax.Array) -> jax.Array:
    """[S, N] centred log t -> [S, n + 4]: intercept, exponents, scaled E, the corrected AIC, and the spread."""
    return jax.vmap(partial(_fit_row, points, largest_offset))(log_times, censored > 0)


@jax.jit
def fit_rows_without_offset(points: Points, log_times: jax.Array, censored: jax.Array) -> jax.Array:
    """`fit_rows` with E = 0: every refit is linear, in closed form."""
    return jax.vmap(partial(_fit_row_without_offset, points))(log_times, censored > 0)


def _fit_row_without_offset(points: Points, y: jax.Array, censored: jax.Array) -> jax.Array:
    weight = points.weight

    def refit(theta: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
        theta = jnp.append(_linear_fit(points.columns, target, weight), 0.0)
        return theta, jnp.sum(weight * (target - _log_time(theta, points)) ** 2)

    measured = jnp.where(censored, 0.0, weight)
    theta = jnp.append(_linear_fit(points.columns, y, measured), 0.0)
    cost = jnp.sum(measured * (y - _log_time(theta, points)) ** 2)
    return _expectation_maximisation(points, y, censored, (theta, cost), refit, has_offset=False)


def _fit_row(points: Points, largest_offset: jax.Array, y: jax.Array, censored: jax.Array) -> jax.Array:
    weight = points.weight
    measured = jnp.where(censored, 0.0, weight)

    # Start: the closed form on log(t - E) of the measured points at each E of a grid, compared by the error of log t.
    def at_offset(offset: jax.Array) -> tuple[jax.Array, jax.Array]:
        left = jnp.maximum(1.0 - offset * jnp.exp(-y), 0.02)
        theta = _linear_fit(points.columns, y + jnp.log(left), measured * left**2)
        theta = jnp.append(theta, offset)
        return theta, jnp.sum(measured * (y - _log_time(theta, points)) ** 2)

    starts, costs = jax.vmap(at_offset)(jnp.linspace(0.0, 0.98, _OFFSETS) * largest_offset)
    free = jnp.full(1 + points.columns.shape[1], jnp.inf)
    lower, upper = jnp.append(-free, 0.0), jnp.append(free, largest_offset)

    def refit(theta: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
        def residual(theta: jax.Array) -> jax.Array:
            return jnp.sqrt(weight) * (target - _log_time(theta, points))

        return levenberg_marquardt(residual, theta, lower, upper, _INNER_ITERATIONS)

    start = starts[jnp.argmin(costs)], jnp.min(costs)
    return _expectation_maximisation(points, y, censored, start, refit, has_offset=True)


def _expectation_maximisation(
    points: Points,
    y: jax.Array,
    censored: jax.Array,
    start: tuple[jax.Array, jax.Array],
    refit: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]],
    *,
    has_offset: bool,
) -> jax.Array:
    """A row of `fit_rows`, from parameters and their weighted sum of squares over measured points."""
    theta, cost = start
    noise = 1.0 / jnp.sqrt(jnp.maximum(points.weight, 1e-12))

    def em(state: tuple[jax.Array, jax.Array], _: None) -> tuple[tuple[jax.Array, jax.Array], None]:
        theta, spread = state
        mean, sigma = _log_time(theta, points), spread * noise
        z = (y - mean) / sigma
        hazard = _hazard(z)
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
    aicc = _aicc(log_likelihood, jnp.sum(points.known), theta.size + has_offset, has_offset=has_offset)
    return jnp.concatenate([theta, jnp.stack([aicc, spread])])


def _hazard(z: jax.Array) -> jax.Array:
    """Density of the standard normal distribution over its share above z; far out by its asymptote z + 1/z."""
    near = jnp.minimum(z, _FAR_OUT)
    exact = jnp.exp(-0.5 * near**2 - 0.5 * jnp.log(2 * jnp.pi) - log_ndtr(-near))
    return jnp.where(z > _FAR_OUT, z + 1.0 / jnp.maximum(z, _FAR_OUT), exact)


def _aicc(log_likelihood: jax.Array, points: jax.Array, parameters: int, *, has_offset: bool) -> jax.Array:
    """Corrected AIC; `parameters` counts the spread. Infinite where too few points are left for an offset."""
    freedom = points - parameters - 1.0
    aicc = 2 * parameters - 2 * log_likelihood + 2 * parameters * (parameters + 1) / jnp.maximum(freedom, 1e-9)
    return jnp.where(freedom <= 0, jnp.inf, aicc) if has_offset else aicc


def _linear_fit(columns: jax.Array, y: jax.Array, weight: jax.Array) -> jax.Array:
    """Weighted least squares of y [N] on 1 and the columns [N, n]; [1 + n].

    Columns are made orthogonal one after the other (Gram and Schmidt): of a few columns that is fast under `vmap`.
    """
    total = jnp.sum(weight)

    def centred(column: jax.Array) -> tuple[jax.Array, jax.Array]:
        mean = jnp.sum(weight * column) / total
        return mean, column - mean

    y_mean, left = centred(y)
    means, apart = map(list, zip(*map(centred, columns.T), strict=True))
    parts = {}
    for i, column in enumerate(apart):
        for j in range(i):
            parts[j, i] = jnp.sum(weight * apart[j] * column) / _square(apart[j], weight)
            column = column - parts[j, i] * apart[j]
        apart[i] = column
    slopes = [jnp.sum(weight * column * left) / _square(column, weight) for column in apart]
    for i in reversed(range(len(slopes))):
        for j in range(i):
            slopes[j] = slopes[j] - parts[j, i] * slopes[i]
    intercept = y_mean - sum(slope * mean for slope, mean in zip(slopes, means, strict=True))
    return jnp.stack([intercept, *slopes])


def _square(column: jax.Array, weight: jax.Array) -> jax.Array:
    return jnp.maximum(jnp.sum(weight * column**2), 1e-12)
