"""Batched small least-squares solvers in JAX: a bounded Levenberg-Marquardt and a non-negative solve.

For problems of at most some 100 points and 15 parameters, in float32, inside `jit` and `vmap`. The factorisations are
written out: sums of products keep full float32 on backends whose matrix products do not, and under `vmap` they are
plain vector code where batched LAPACK calls of such sizes are mostly overhead.
"""

from collections.abc import Callable
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np

_State = tuple[jax.Array, jax.Array, jax.Array]  # parameters, damping, sum of squares

ROWS_PER_CALL = 32
"""Bootstrap rows are fitted in blocks of this many, so one compiled program serves any number of them."""


def in_blocks(fit: Callable[..., jax.Array], *rows: np.ndarray) -> np.ndarray:
    """Runs a jitted, batched fit over blocks of rows, all of one shape.

    Args:
        fit: arrays [ROWS_PER_CALL, N] -> [ROWS_PER_CALL, n] parameters; N is padded as by `pad_rows`.
        rows: arrays [S, N].

    Returns:
        [S, n] parameters, float64 holding the float32 results.
    """
    number = len(rows[0])
    padding = -number % ROWS_PER_CALL
    blocks = []
    for array in map(pad_rows, rows):
        padded = np.concatenate([array, np.repeat(array[:1], padding, axis=0)])
        blocks.append(padded.reshape(-1, ROWS_PER_CALL, array.shape[1]))
    fitted = [fit(*map(jnp.asarray, block)) for block in zip(*blocks, strict=True)]
    return np.concatenate([np.asarray(block, np.float64) for block in fitted])[:number]


def pad_points(values: np.ndarray, fill: float, multiple: int = 32) -> np.ndarray:
    """Pads the first axis with `fill` to a multiple of `multiple`, so that few shapes are compiled."""
    padding = -len(values) % multiple
    return np.concatenate([values, np.full((padding, *values.shape[1:]), fill, values.dtype)])


def pad_rows(rows: np.ndarray) -> np.ndarray:
    """Rows [S, N] of points in float32, padded as columns are: see `device_column`."""
    return pad_points(rows.astype(np.float32).T, 0.0).T


def device_column(column: np.ndarray) -> jax.Array:
    """A column [N] in float32 on the device, padded with zeros to a multiple of 32."""
    return jnp.asarray(pad_points(column.astype(np.float32), 0.0))


def levenberg_marquardt(
    residual: Callable[[jax.Array], jax.Array],
    theta: jax.Array,
    lower: jax.Array,
    upper: jax.Array,
    iterations: int,
) -> tuple[jax.Array, jax.Array]:
    """Minimises sum(residual(theta)**2) in a box, with a fixed number of iterations.

    Each step solves the damped problem (Marquardt 1963: damping in the scale of each column) by modified Gram-Schmidt
    on the augmented matrix, not by normal equations, which would square the condition number in float32. Parameters
    that sit on a bound with the gradient pointing outwards are held for that step; the rest is clipped to the box.

    Args:
        residual: [n] parameters -> [N] weighted residuals.
        theta: [n] start.
        lower: [n] lower bounds.
        upper: [n] upper bounds.
        iterations: number of steps.

    Returns:
        ([n] parameters, [] sum of squares).
    """

    def step(state: _State, _: None) -> tuple[_State, None]:
        theta, damping, cost = state
        value, jacobian = residual(theta), jax.jacfwd(residual)(theta)
        gradient = jnp.sum(jacobian * value[:, None], axis=0)
        held = ((theta <= lower) & (gradient > 0)) | ((theta >= upper) & (gradient < 0))
        jacobian = jnp.where(held[None, :], 0.0, jacobian)
        scale = jnp.sqrt(jnp.maximum(jnp.sum(jacobian**2, axis=0), 1e-12))
        augmented = jnp.concatenate([jacobian, jnp.diag(jnp.sqrt(damping) * scale)])
        target = jnp.concatenate([-value, jnp.zeros_like(theta)])
        candidate = jnp.clip(theta + _gram_schmidt_solve(augmented, target), lower, upper)
        candidate_cost = jnp.sum(residual(candidate) ** 2)
        better = candidate_cost < cost
        damping = jnp.clip(jnp.where(better, damping / 5.0, damping * 4.0), 1e-7, 1e7)
        return (jnp.where(better, candidate, theta), damping, jnp.where(better, candidate_cost, cost)), None

    theta = jnp.clip(theta, lower, upper)
    start = (theta, jnp.float32(1e-3), jnp.sum(residual(theta) ** 2))
    (theta, _, cost), _ = jax.lax.scan(step, start, None, length=iterations)
    return theta, cost


def _gram_schmidt_solve(matrix: jax.Array, target: jax.Array) -> jax.Array:
    """Solves min ||matrix @ x - target|| for a [N, n] matrix of full rank: MGS with the target as last column."""
    size = matrix.shape[1]
    later = jnp.arange(size + 1)

    def orthogonalise(columns: jax.Array, j: jax.Array) -> tuple[jax.Array, jax.Array]:
        norm = jnp.sqrt(jnp.sum(columns[:, j] ** 2))
        unit = columns[:, j] / norm
        row = jnp.where(later > j, jnp.sum(unit[:, None] * columns, axis=0), 0.0)
        return columns - unit[:, None] * row[None, :], row.at[j].set(norm)

    def substitute(x: jax.Array, j: jax.Array) -> tuple[jax.Array, None]:
        return x.at[j].set((upper[j, size] - jnp.sum(upper[j, :size] * x)) / upper[j, j]), None

    _, upper = jax.lax.scan(orthogonalise, jnp.concatenate([matrix, target[:, None]], axis=1), jnp.arange(size))
    return jax.lax.scan(substitute, jnp.zeros(size), jnp.arange(size), reverse=True)[0]


def nonnegative_solve(basis: jax.Array, target: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Minimises sum(weights * (basis @ x - target)**2) over x >= 0 exactly, by a solve for each set of active columns.

    Args:
        basis: [N, n] columns; n <= 3 or so, as it takes 2**n small solves.
        target: [N] values to fit.
        weights: [N] weights, not negative.

    Returns:
        ([n] coefficients, [] sum of squares).
    """
    size = basis.shape[1]
    weighted = basis * weights[:, None]
    gram = jnp.sum(weighted[:, :, None] * basis[:, None, :], axis=0)
    right = jnp.sum(weighted * target[:, None], axis=0)

    def restricted(active: jax.Array) -> tuple[jax.Array, jax.Array]:
        both = active[:, None] & active[None, :]
        ridge = jnp.where(active, 1e-6 * jnp.diagonal(gram) + 1e-12, 1.0)
        x = _gram_schmidt_solve(jnp.where(both, gram, 0.0) + jnp.diag(ridge), jnp.where(active, right, 0.0))
        residuals = jnp.sum(basis * x[None, :], axis=1) - target
        return x, jnp.where(jnp.all(x >= 0), jnp.sum(weights * residuals**2), jnp.inf)

    subsets = jnp.asarray([s for s in product((False, True), repeat=size) if any(s)])
    solutions, costs = jax.vmap(restricted)(subsets)
    best = jnp.argmin(costs)
    return solutions[best], costs[best]
