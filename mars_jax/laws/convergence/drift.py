"""Convergence rule `drift`: the relative change of a module's update from half a step count to the step is small."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from mars_jax.laws.convergence.base import Convergence, Measurements, Rule


def drift(steps: jax.Array, change: jax.Array, end: jax.Array, epsilon: jax.Array, sustain: jax.Array) -> Convergence:
    """First step after which the relative drift of a module's update stays at or below `epsilon`.

    The drift is ||Delta(t) - Delta(t/2)||_F / ||Delta(t)||_F of the product Delta = scale * A @ B (A and B alone have a
    gauge freedom, so their norms mean nothing). The grid is log-spaced, so the crossing is interpolated in log step.
    Leading NaN are eval points without a t/2. The time is undefined when a later drift is not finite, or when none is
    finite (the module did not move). It is censored when fewer than `sustain` eval points, at the end of the curve, are
    at or below `epsilon`. Where all are, it is the first eval point with a drift, an upper bound.

    Args:
        steps: [N] optimizer steps of the eval points.
        change: [N] relative drifts.
        end: [] number of eval points of the lane.
        epsilon: [] threshold.
        sustain: [] least number of eval points after the crossing.

    Returns:
        The convergence time in steps and whether it is censored, [].
    """
    points = jnp.arange(steps.size)
    read = points < end
    finite = jnp.isfinite(change) & read
    start = jnp.argmax(finite)
    defined = jnp.any(finite) & jnp.all(finite | (points < start) | ~read)
    above = (points >= start) & (change > epsilon) & read
    last_above = jnp.max(jnp.where(above, points, -1))
    first_below = jnp.maximum(last_above + 1, start)
    censored = end - first_below < sustain
    left, right = jnp.maximum(last_above, 0), jnp.minimum(first_below, end - 1)
    high, low = change[left], change[right]
    part = jnp.where(high > low, (high - epsilon) / jnp.where(high > low, high - low, 1.0), 1.0)
    between = steps[left] * (steps[right] / jnp.maximum(steps[left], 1e-30)) ** part
    time = jnp.where((last_above >= 0) & (steps[left] > 0), between, steps[right])
    return Convergence(jnp.where(defined, jnp.where(censored, steps[end - 1], time), jnp.nan), censored & defined)


def _curves(points: Sequence[Measurements], adapted: Sequence[str]) -> Mapping[str, Sequence[float]]:
    return {module: [point.drift[module] for point in points] for module in points[0].drift} if points else {}


DRIFT = Rule("drift", drift, _curves, needs_single_module=False, needs_swaps=False, epsilon=0.3)
