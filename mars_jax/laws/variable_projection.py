"""Law-P fitted by variable projection, on the device, for a batch of data sets: amplitudes follow from exponents.

Exponents start from a Sobol set in their box (`sobol_starts`); the best starts are polished together with the
amplitudes. Units are scaled: logs are of r/16 and D/1024.
"""

from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mars_jax.laws.least_squares import levenberg_marquardt, nonnegative_solve

Form = Literal["power", "power_overfit"]
"""The published form of Law-P, and that with an over-fitting term."""

_BOUNDS = {"alpha": (0.0, 1.5), "beta": (0.0, 2.0), "kappa": (0.0, 2.0), "eta": (-1.0, 3.0)}
_STARTS = 511


def exponent_bounds(form: Form, modules: int) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper bounds of (alpha..., beta[, kappa..., eta])."""
    names = ["alpha"] * modules + ["beta"]
    if form == "power_overfit":
        names += ["kappa"] * modules + ["eta"]
    lower, upper = np.array([_BOUNDS[name] for name in names], np.float32).T
    return lower, upper


def sobol_starts(lower: np.ndarray, upper: np.ndarray) -> np.ndarray:
    """A Sobol set of exponents in the box; [_STARTS, n]."""
    from scipy.stats import qmc  # takes a second to import, and is used only here

    unit = qmc.Sobol(len(lower), scramble=False).random(_STARTS + 1)[1:]
    return (lower + unit * (upper - lower)).astype(np.float32)


def _basis(exponents: jax.Array, log_ranks: jax.Array, log_samples: jax.Array) -> jax.Array:
    """Columns that multiply A, E (and C), [N, 2 or 3]."""
    modules = log_ranks.shape[1]

    def power(exponent: jax.Array) -> jax.Array:
        return jnp.exp(jnp.sum(exponent[None, :modules] * log_ranks, axis=1) + exponent[modules] * log_samples)

    falling = power(-exponents[: modules + 1])
    columns = [falling, jnp.ones_like(falling)]
    if exponents.size > modules + 1:
        columns.append(power(exponents[modules + 1 :]))
    return jnp.stack(columns, axis=1)


def linearised(
    form: Form, scaled: np.ndarray, log_ranks: np.ndarray, log_samples: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """[N] losses of a fit, and [N, m] their derivatives by the m parameters that aren't on a bound."""
    lower, upper = exponent_bounds(form, log_ranks.shape[1])
    logs = np.column_stack([log_ranks, log_samples])
    falling, rising = scaled[: logs.shape[1]], scaled[logs.shape[1] : len(lower)]
    terms = [np.exp(-logs @ falling), np.ones(len(logs)), *([np.exp(logs @ rising)] if len(rising) else [])]
    amplitudes = scaled[len(lower) :]
    by_exponents = [-amplitudes[0] * terms[0][:, None] * logs]
    if len(rising):
        by_exponents.append(amplitudes[2] * terms[2][:, None] * logs)
    jacobian = np.column_stack([*by_exponents, *terms])
    free = np.concatenate([(scaled[: len(lower)] > lower) & (scaled[: len(lower)] < upper), amplitudes > 0])
    # Where a term is 0 its exponents change nothing.
    return np.column_stack(terms) @ amplitudes, jacobian[:, free & np.any(jacobian != 0, axis=0)]


class Points(NamedTuple):
    """Padded device columns: scaled logs [N, M] and [N], and inverse scales [N] of the errors of losses."""

    log_ranks: jax.Array
    log_samples: jax.Array
    inverse_scale: jax.Array


Fitted = tuple[jax.Array, jax.Array]


def _huber_residuals(errors: jax.Array, threshold: jax.Array) -> jax.Array:
    """Residuals whose squares are twice the Huber loss: beyond the threshold h, the root of 2 h |error| - h**2."""
    beyond = jnp.sqrt(threshold * (2.0 * jnp.maximum(jnp.abs(errors), threshold) - threshold))
    return jnp.where(jnp.abs(errors) <= threshold, errors, jnp.sign(errors) * beyond)


@partial(jax.jit, static_argnums=(0, 1))
def fit_rows(
    overfit: bool,
    polish: tuple[int, int],
    starts: jax.Array,
    points: Points,
    threshold: jax.Array,
    losses: jax.Array,
    weights: jax.Array,
) -> Fitted:
    """[S, N] losses and weights -> ([S, n] exponents, A, E (and C) in scaled units, [S, F] costs of the F starts)."""
    log_ranks, log_samples, inverse_scale = points
    linear, (refined_starts, iterations) = 3 if overfit else 2, polish
    lower, upper = exponent_bounds("power_overfit" if overfit else "power", log_ranks.shape[1])
    below = jnp.concatenate([jnp.asarray(lower), jnp.zeros(linear)])
    above = jnp.concatenate([jnp.asarray(upper), jnp.full(linear, jnp.inf)])

    # The bases of the starts are the same for every row.
    bases = jax.vmap(_basis, in_axes=(0, None, None))(starts, log_ranks, log_samples)

    def one_row(losses: jax.Array, weight: jax.Array) -> Fitted:
        squared = weight * inverse_scale**2
        coefficients, start_costs = jax.vmap(nonnegative_solve, in_axes=(0, None, None))(bases, losses, squared)
        best = jax.lax.top_k(-start_costs, refined_starts)[1]
        thetas = jnp.concatenate([starts[best], coefficients[best]], axis=1)

        def residual(theta: jax.Array) -> jax.Array:
            predicted = jnp.sum(_basis(theta[:-linear], log_ranks, log_samples) * theta[None, -linear:], axis=1)
            return jnp.sqrt(weight) * _huber_residuals((predicted - losses) * inverse_scale, threshold)

        refined, costs = jax.vmap(lambda theta: levenberg_marquardt(residual, theta, below, above, iterations))(thetas)
        return refined[jnp.argmin(costs)], start_costs

    return jax.vmap(one_row)(losses, weights)
