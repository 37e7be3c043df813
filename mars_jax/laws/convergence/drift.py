"""Convergence rule `drift`: a module's update stops changing between a step and its double."""

import jax
import jax.numpy as jnp

from mars_jax.laws.convergence.base import Convergence


@jax.jit
def drift(
    steps: jax.Array, drifts: jax.Array, num_looks: jax.Array, epsilon: jax.Array, sustain: jax.Array
) -> Convergence:
    """First step after which the relative drift of a module's update stays at or below `epsilon`.

    The drift is ||Delta(t) - Delta(t/2)||_F / ||Delta(t)||_F of the product Delta = scale * A @ B (A and B alone have a
    gauge freedom, so their norms mean nothing). The grid is log-spaced, so the crossing is interpolated in log step.
    Leading NaN are looks without a t/2; a look that is not finite after the first finite one makes the module
    undefined, as does a module without any finite look (it did not move). Censored when fewer than `sustain` looks,
    at the end of the curve, are at or below `epsilon`. Below the threshold from the first look on, the time is that
    look: an upper bound.
    """
    looks = jnp.arange(steps.size)

    def one_module(drift: jax.Array, end: jax.Array) -> Convergence:
        read = looks < end
        finite = jnp.isfinite(drift) & read
        start = jnp.argmax(finite)
        defined = jnp.any(finite) & jnp.all(finite | (looks < start) | ~read)
        above = (looks >= start) & (drift > epsilon) & read
        last_above = jnp.max(jnp.where(above, looks, -1))
        first_below = jnp.maximum(last_above + 1, start)
        censored = end - first_below < sustain
        left, right = jnp.maximum(last_above, 0), jnp.minimum(first_below, end - 1)
        high, low = drift[left], drift[right]
        part = jnp.where(high > low, (high - epsilon) / jnp.where(high > low, high - low, 1.0), 1.0)
        between = steps[left] * (steps[right] / jnp.maximum(steps[left], 1e-30)) ** part
        time = jnp.where((last_above >= 0) & (steps[left] > 0), between, steps[right])
        return Convergence(jnp.where(defined, jnp.where(censored, steps[end - 1], time), jnp.nan), censored & defined)

    return jax.vmap(jax.vmap(one_module, in_axes=(0, None)))(drifts, num_looks)
