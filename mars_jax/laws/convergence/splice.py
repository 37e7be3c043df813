"""Convergence rule `splice`: swapping a module back to an earlier eval point raises the best loss only little."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from mars_jax.laws.convergence.base import Convergence, Measurements, Rule, late_fall

# Least share of the lane's best loss that a module's training must account for; below it, no time is defined.
_INACTIVE = 0.01


def splice(steps: jax.Array, share: jax.Array, end: jax.Array, epsilon: jax.Array, sustain: jax.Array) -> Convergence:
    """First step after which the cost of a module swap stays at or below `epsilon` of its first value.

    The cost is the rise of the best eval point's loss when the module is swapped back to an earlier eval point: the
    price of stopping the module's training there. The crossing is interpolated in log step, as the grid is log-spaced.
    Censored when the cost still falls, over the eval points of the last tenth of the horizon or more, by over 1 % of
    its first value in a tenth, or when fewer than `sustain` eval points lie after the crossing. Undefined when the
    lane's best eval point is its first, a loss is not finite, or the best loss would rise by less than 1 % without the
    module's training.

    Args:
        steps: [N] optimizer steps of the eval points.
        share: [N] cost of the swap as a share of the lane's best loss; NaN after the best eval point.
        end: [] number of eval points of the lane.
        epsilon: [] threshold.
        sustain: [] least number of eval points after the crossing.

    Returns:
        The convergence time in steps and whether it is censored, [].
    """
    points = jnp.arange(steps.size)
    horizon = steps[end - 1]
    read = (points < end) & jnp.isfinite(share)
    best = jnp.max(jnp.where(read, points, 0))
    defined = jnp.all(read | (points > best)) & (share[0] > _INACTIVE)
    remaining = jnp.where(read, share, 0.0) / jnp.where(defined, share[0], 1.0)
    last_above = jnp.max(jnp.where(remaining > epsilon, points, 0))
    first_below = jnp.minimum(last_above + 1, end - 1)
    high, low = remaining[last_above], remaining[first_below]
    part = jnp.where(high > low, (high - epsilon) / jnp.where(high > low, high - low, 1.0), 1.0)
    left, right = steps[last_above], steps[first_below]
    between = jnp.where(left > 0, left * (right / jnp.maximum(left, 1e-30)) ** part, part * right)
    early = (steps <= 0.9 * horizon) & (points < end)
    late = remaining[jnp.max(jnp.where(early, points, 0))] > late_fall(steps, early, horizon)
    censored = late | (end - first_below < sustain)
    return Convergence(jnp.where(defined, jnp.where(censored, horizon, between), jnp.nan), censored & defined)


def _curves(points: Sequence[Measurements], adapted: Sequence[str]) -> Mapping[str, Sequence[float]]:
    """Cost of each module's swaps, as a share of the lane's best loss."""
    unit = max(min(point.validation_loss for point in points), 1e-9)
    modules = {module for point in points for module in point.remaining}
    return {module: [point.remaining.get(module, jnp.nan) / unit for point in points] for module in modules}


SPLICE = Rule("splice", splice, _curves, needs_single_module=False, needs_swaps=True, epsilon=0.1)
