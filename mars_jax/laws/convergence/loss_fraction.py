"""Convergence rule `loss_fraction`: the loss of a lane that adapts one module is close to its best."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from mars_jax.laws.convergence.base import Convergence, Measurements, Rule, late_fall


def loss_fraction(
    steps: jax.Array, loss: jax.Array, end: jax.Array, epsilon: jax.Array, sustain: jax.Array
) -> Convergence:
    """First step after which the loss stays within `epsilon` of the lane's own drop, up to its best step.

    With L_0 the first loss, L_min the smallest and f(t) = (L(t) - L_min) / (L_0 - L_min), the time is where f crosses
    epsilon for the last time *before the best step*, interpolated linearly between eval points. Losses after the best
    step are not read: over-fitting does not undo convergence. Censored when, over the eval points of the last tenth of
    the horizon or more, the loss still falls by over 1 % of the drop in a tenth, or when fewer than `sustain` eval
    points lie after the crossing. Undefined when a loss is not finite or none is below the first.

    Args:
        steps: [N] optimizer steps of the eval points.
        loss: [N] validation losses in nats a token.
        end: [] number of eval points of the lane.
        epsilon: [] threshold.
        sustain: [] least number of eval points after the crossing.

    Returns:
        The convergence time in steps and whether it is censored, [].
    """
    points = jnp.arange(steps.size)
    horizon = steps[end - 1]
    read = points < end
    best = jnp.argmin(jnp.where(read, loss, jnp.inf))
    drop = loss[0] - loss[best]
    defined = jnp.all(jnp.isfinite(loss) | ~read) & (drop > 0)
    remaining = (loss - loss[best]) / jnp.where(drop > 0, drop, 1.0)
    last_above = jnp.max(jnp.where((points <= best) & (remaining > epsilon), points, 0))
    first_below = jnp.minimum(last_above + 1, end - 1)
    high, low = remaining[last_above], remaining[first_below]
    part = jnp.where(high > low, (high - epsilon) / jnp.where(high > low, high - low, 1.0), 0.0)
    time = steps[last_above] + part * (steps[first_below] - steps[last_above])
    early = (steps <= 0.9 * horizon) & read
    fallen = jnp.min(jnp.where(early, loss, jnp.inf)) - loss[best]
    censored = (fallen > late_fall(steps, early, horizon) * drop) | (end - first_below < sustain)
    return Convergence(jnp.where(defined, jnp.where(censored, horizon, time), jnp.nan), censored & defined)


def _curves(points: Sequence[Measurements], adapted: Sequence[str]) -> Mapping[str, Sequence[float]]:
    return {module: [point.validation_loss for point in points] for module in adapted}


LOSS_FRACTION = Rule("loss_fraction", loss_fraction, _curves, needs_single_module=True, needs_swaps=False, epsilon=0.1)
