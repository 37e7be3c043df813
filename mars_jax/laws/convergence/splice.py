"""Convergence rule `splice`: a module put back to an earlier eval point costs little."""

import jax
import jax.numpy as jnp

from mars_jax.laws.convergence.base import Convergence, late_fall

# Of the lane's best loss, what a module must take away to be said to converge.
_INACTIVE = 0.01


@jax.jit
def splice(
    steps: jax.Array, shares: jax.Array, num_looks: jax.Array, epsilon: jax.Array, sustain: jax.Array
) -> Convergence:
    """First step after which what remains for a module stays at or below `epsilon` of what did at first.

    What remains is how far the best look's loss would rise with that module put back to where it was at a look: from
    then on, the module could have stopped for that price. The crossing is interpolated in log step, as the grid is
    log-spaced. Censored when it still falls, over the looks of the last tenth of the horizon or more, by over 1 % of
    its first in a tenth, or when fewer than `sustain` looks lie after the crossing. Undefined when there is nothing to
    converge to: the lane's best look is its first, a loss is not finite, or without the module's training the best loss
    would rise by less than 1 %.
    """
    looks = jnp.arange(steps.size)

    def one_module(share: jax.Array, end: jax.Array) -> Convergence:
        horizon = steps[end - 1]
        read = (looks < end) & jnp.isfinite(share)
        best = jnp.max(jnp.where(read, looks, 0))
        defined = jnp.all(read | (looks > best)) & (share[0] > _INACTIVE)
        remaining = jnp.where(read, share, 0.0) / jnp.where(defined, share[0], 1.0)
        last_above = jnp.max(jnp.where(remaining > epsilon, looks, 0))
        first_below = jnp.minimum(last_above + 1, end - 1)
        high, low = remaining[last_above], remaining[first_below]
        part = jnp.where(high > low, (high - epsilon) / jnp.where(high > low, high - low, 1.0), 1.0)
        left, right = steps[last_above], steps[first_below]
        between = jnp.where(left > 0, left * (right / jnp.maximum(left, 1e-30)) ** part, part * right)
        early = (steps <= 0.9 * horizon) & (looks < end)
        late = remaining[jnp.max(jnp.where(early, looks, 0))] > late_fall(steps, early, horizon)
        censored = late | (end - first_below < sustain)
        return Convergence(jnp.where(defined, jnp.where(censored, horizon, between), jnp.nan), censored & defined)

    return jax.vmap(jax.vmap(one_module, in_axes=(0, None)))(shares, num_looks)
