"""When has a module (or a lane) converged? Rules that read curves and return steps, nothing else.

No training, no measuring of the curves and no fitting of laws happens here. A rule is data (`ConvergenceRule`); the
function of each rule is pure and jitted, and `_RULES` is the one place that a new rule is added to.

Every rule returns a `Convergence`. Three outcomes are kept apart:
- converged: `steps` is the convergence time, `censored` is False;
- censored: it had not converged at its horizon, so `steps` is the horizon, a lower bound, and `censored` is True;
- undefined: the curve is not finite, or there was nothing to converge to; `steps` is NaN and `censored` is False.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from mars_jax.errors import ConfigError

# Of the lane's best loss, what a module must take away to be said to converge.
_INACTIVE = 0.01

RuleName = Literal["loss_fraction", "splice", "drift"]


@dataclass(frozen=True)
class ConvergenceRule:
    """Which rule, and its two numbers.

    Attributes:
      name: `loss_fraction` (lanes that adapt one module), `splice` (per module, after the run) or `drift` (per module,
        online).
      epsilon: threshold, in (0, 1): share of the lane's own drop (loss_fraction), of what a module takes off the best
        look's loss (splice), or relative change (drift).
      sustain: looks, from the convergence time to the end of the curve, that must exist before it counts.
    """

    name: RuleName = "loss_fraction"
    epsilon: float = 0.1
    sustain: int = 3

    def __post_init__(self) -> None:
        """Refuse values that no rule can use."""
        allowed = get_args(RuleName)
        if self.name not in allowed:
            raise ConfigError(f"convergence rule name is {self.name!r}; allowed: {', '.join(allowed)}.")
        if not 0.0 < self.epsilon < 1.0:
            raise ConfigError(f"convergence rule epsilon is {self.epsilon}; allowed: between 0 and 1, both excluded.")
        if self.sustain < 1:
            raise ConfigError(f"convergence rule sustain is {self.sustain}; allowed: 1 or more looks.")


class Convergence(NamedTuple):
    """What a rule found. Both arrays are [K] (loss_fraction) or [K, M] (splice, drift).

    Attributes:
      steps: optimizer steps, float32; the horizon where censored, NaN where undefined.
      censored: True where it had not converged at the horizon.
    """

    steps: jax.Array
    censored: jax.Array


def converge(
    rule: ConvergenceRule, steps: ArrayLike, curves: ArrayLike, num_looks: ArrayLike | None = None
) -> Convergence:
    """Applies a rule to curves over a common grid of steps.

    Args:
      rule: which rule and its threshold.
      steps: [N] optimizer steps of the looks, strictly increasing, N >= 2.
      curves: [K, N] validation losses in nats (`loss_fraction`), [K, M, N] what remains for each module at a look, as a
        share of the lane's best loss, NaN after the best look (`splice`), or [K, M, N] relative drifts (`drift`).
      num_looks: int [K], looks at which each curve ends, at least 2; what comes after isn't read. None: N.

    Returns:
      The convergence times and whether each is censored.

    Raises:
      ValueError: the shapes do not fit together.
    """
    steps = np.asarray(steps, np.float32)
    curves = curves.astype(np.float32) if isinstance(curves, jax.Array) else np.asarray(curves, np.float32)
    function, axes = _RULES[rule.name]
    if steps.ndim != 1 or steps.size < 2 or curves.ndim != len(axes) or curves.shape[-1] != steps.size:
        raise ValueError(
            f"rule {rule.name!r} takes steps [N] with N >= 2 and curves [{', '.join(axes)}]; "
            f"got steps {steps.shape} and curves {curves.shape}."
        )
    ends = np.full(curves.shape[0], steps.size) if num_looks is None else np.asarray(num_looks)
    if ends.shape != curves.shape[:1] or not ((ends >= 2) & (ends <= steps.size)).all():
        raise ValueError(f"num_looks must be [{curves.shape[0]}] numbers from 2 to {steps.size}; got {ends.tolist()}.")
    return function(steps, curves, ends.astype(np.int32), np.float32(rule.epsilon), np.int32(rule.sustain))


@jax.jit
def _loss_fraction(
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
        censored = (fallen > _late_fall(steps, early, horizon) * drop) | (end - first_below < sustain)
        return Convergence(jnp.where(defined, jnp.where(censored, horizon, time), jnp.nan), censored & defined)

    return jax.vmap(one_lane)(losses, num_looks)


@jax.jit
def _splice(
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
        late = remaining[jnp.max(jnp.where(early, looks, 0))] > _late_fall(steps, early, horizon)
        censored = late | (end - first_below < sustain)
        return Convergence(jnp.where(defined, jnp.where(censored, horizon, between), jnp.nan), censored & defined)

    return jax.vmap(jax.vmap(one_module, in_axes=(0, None)))(shares, num_looks)


def _late_fall(steps: jax.Array, early: jax.Array, horizon: jax.Array) -> jax.Array:
    """What may fall after the last early look: 1 % of the whole for each tenth of the horizon that is left then."""
    return 0.1 * (1.0 - jnp.max(jnp.where(early, steps, 0.0)) / horizon)


@jax.jit
def _drift(
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


_Rule = Callable[[ArrayLike, ArrayLike, ArrayLike, ArrayLike, ArrayLike], Convergence]
_RULES: dict[str, tuple[_Rule, tuple[str, ...]]] = {
    "loss_fraction": (_loss_fraction, ("K", "N")),
    "splice": (_splice, ("K", "M", "N")),
    "drift": (_drift, ("K", "M", "N")),
}
