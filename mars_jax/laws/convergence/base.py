"""Types that all convergence rules share."""

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from mars_jax.errors import ConfigError

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


def late_fall(steps: jax.Array, early: jax.Array, horizon: jax.Array) -> jax.Array:
    """What may fall after the last early look: 1 % of the whole for each tenth of the horizon that is left then."""
    return 0.1 * (1.0 - jnp.max(jnp.where(early, steps, 0.0)) / horizon)
