"""Convergence rule `loss_fraction`: the loss of a lane that adapts one module comes close to its best."""

import jax
import jax.numpy as jnp

from mars_jax.laws.convergence.base import Convergence, late_fall


@jax.jit
def loss_fraction(
    steps: jax.Array, losses: jax.Array, num_looks: jax.Array, epsilon: jax.Array, sustain: jax.Array
) -> Convergence:
    """First step after which the loss stays within `epsilon` of the lane's own drop, up to its best step.

    With L_0 the first loss, L_min the smallest and f(t) = (L(t) - L_min) / (L_0 - L_min), the time is where f crosses
    epsilon for the last time *before the best step*, linear between looks. What comes after the best step is not read:
    over-fitting does not undo convergence. Censored when, over the looks of the last tenth of the horizon or more, the
    loss still falls by over 1 % of the drop in a tenth, or when fewer than `sustain` looks lie after the crossing.
    Undefined when a loss is not finite or none is below the first.
    """
    looks = jnp.arange(steps.size)

    def one_lane(loss: jax.Array, end: jax.Array) -> Convergence:
        horizon = steps[end - 1]
        read = looks < end
        best = jnp.argmin(jnp.where(read, loss, jnp.inf))
        drop = loss[0] - loss[best]
        defined = jnp.all(jnp.isfinite(loss) | ~read) & (drop > 0)
        remaining = (loss - loss[best]) / jnp.where(drop > 0, drop, 1.0)
        last_above = jnp.max(jnp.where((looks <= best) & (remaining > epsilon), looks, 0))
        first_below = jnp.minimum(last_above + 1, end - 1)
        high, low = remaining[last_above], remaining[first_below]
        part = jnp.where(high > low, (high - epsilon) / jnp.where(high > low, high - low, 1.0), 0.0)
        time = steps[last_above] + part * (steps[first_below] - steps[last_above])
        early = (steps <= 0.9 * horizon) & read
        fallen = jnp.min(jnp.where(early, loss, jnp.inf)) - loss[best]
        censored = (fallen > late_fall(steps, early, horizon) * drop) | (end - first_below < sustain)
        return Convergence(jnp.where(defined, jnp.where(censored, horizon, time), jnp.nan), censored & defined)

    return jax.vmap(one_lane)(losses, num_looks)
