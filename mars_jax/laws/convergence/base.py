"""Common parts of the convergence rules: their type, their result, and how one is applied to curves.

Every rule returns a `Convergence`. Three outcomes are kept apart:
- converged: `steps` is the convergence time, `censored` is False;
- censored: it had not converged at its horizon, so `steps` is the horizon, a lower bound, and `censored` is True;
- undefined: the curve is not finite, or the module had no effect; `steps` is NaN and `censored` is False.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from mars_jax.errors import ConfigError
from mars_jax.laws.convergence.registry import RULES


class Convergence(NamedTuple):
    """Result of a rule, arrays of the shape of the curves without their last axis.

    Attributes:
        steps: optimizer steps, float32; the horizon where censored, NaN where undefined.
        censored: True where it had not converged at the horizon.
    """

    steps: jax.Array
    censored: jax.Array


class Measurements(Protocol):
    """Measurements of an eval point that rules read; `lanes.eval_points.EvalPoint` has them."""

    @property
    def validation_loss(self) -> float:
        """Validation loss, in nats a supervised token."""
        ...

    @property
    def drift(self) -> Mapping[str, float]:
        """Module -> relative change of its update since half the step."""
        ...

    @property
    def remaining(self) -> Mapping[str, float]:
        """Module -> rise of the best loss, in nats, when the module is swapped back to this eval point."""
        ...


RuleFunction = Callable[[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array], Convergence]
"""(steps [N], curve [N], number of eval points [], epsilon [], sustain []) -> Convergence of scalars; traced by JAX."""

Curves = Callable[[Sequence[Measurements], Sequence[str]], Mapping[str, Sequence[float]]]
"""(eval points of a lane, its adapted modules) -> module -> the curve [N] that the rule reads."""


@dataclass(frozen=True)
class Rule:
    """A convergence rule.

    Attributes:
        name: name of the rule in configs.
        function: convergence time of one curve.
        curves: curves of a lane's modules.
        needs_single_module: whether the rule reads lanes that adapt one module only, which are then planned too.
        needs_swaps: whether the rule reads module swaps, which cost forward passes at every eval point.
        epsilon: threshold where the config has none, in (0, 1).
    """

    name: str
    function: RuleFunction
    curves: Curves
    needs_single_module: bool
    needs_swaps: bool
    epsilon: float


@dataclass(frozen=True)
class ConvergenceRule:
    """A rule by name, with its threshold and its number of eval points.

    Attributes:
        name: name of a rule in `RULES`.
        epsilon: threshold, in (0, 1): share of the lane's fall in loss (loss_fraction), of the module's part in that
            fall (splice), or relative change (drift).
        sustain: least number of eval points from the convergence time to the end of the curve.
    """

    name: str = "loss_fraction"
    epsilon: float = 0.1
    sustain: int = 3

    def __post_init__(self) -> None:
        """Refuses values that no rule can use."""
        RULES.check(self.name)
        if not 0.0 < self.epsilon < 1.0:
            raise ConfigError(f"convergence rule epsilon is {self.epsilon}; allowed: between 0 and 1, both excluded.")
        if self.sustain < 1:
            raise ConfigError(f"convergence rule sustain is {self.sustain}; allowed: 1 or more eval points.")

    @property
    def rule(self) -> Rule:
        """The rule of this name."""
        return RULES[self.name]


def converge(
    rule: ConvergenceRule, steps: ArrayLike, curves: ArrayLike, num_points: ArrayLike | None = None
) -> Convergence:
    """Convergence times of curves over a common grid of steps.

    Args:
        rule: the rule and its threshold.
        steps: [N] optimizer steps of the eval points, strictly increasing, N >= 2.
        curves: [K, M, N] of K lanes and M modules, or [K, N] for rules of lanes that adapt one module: validation
            losses in nats (`loss_fraction`); rise of the lane's best loss when the module is swapped back to an eval
            point, as a share of that loss, NaN after the best eval point (`splice`); relative drifts (`drift`).
        num_points: int [K], number of eval points of each lane, at least 2; later ones are not read. None: N.

    Returns:
        Convergence times in optimizer steps and whether each is censored, [K] or [K, M].

    Raises:
        ValueError: the shapes do not fit together.
    """
    steps = np.asarray(steps, np.float32)
    curves = curves.astype(np.float32) if isinstance(curves, jax.Array) else np.asarray(curves, np.float32)
    # A lane that adapts one module has one curve, so a rule of such lanes needs no axis of modules.
    axes = {2: "[K, N]", 3: "[K, M, N]"} if rule.rule.needs_single_module else {3: "[K, M, N]"}
    if steps.ndim != 1 or steps.size < 2 or curves.ndim not in axes or curves.shape[-1] != steps.size:
        raise ValueError(
            f"rule {rule.name!r} takes steps [N] with N >= 2 and curves {' or '.join(axes.values())}; "
            f"got steps {steps.shape} and curves {curves.shape}."
        )
    ends = np.full(curves.shape[0], steps.size) if num_points is None else np.asarray(num_points)
    if ends.shape != curves.shape[:1] or not ((ends >= 2) & (ends <= steps.size)).all():
        raise ValueError(f"num_points must be [{curves.shape[0]}] numbers from 2 to {steps.size}; got {ends.tolist()}.")
    apply = _over_lanes(rule.rule.function, per_module=curves.ndim == 3)
    return apply(steps, curves, ends.astype(np.int32), np.float32(rule.epsilon), np.int32(rule.sustain))


@lru_cache
def _over_lanes(function: RuleFunction, per_module: bool) -> Callable[..., Convergence]:
    """Maps the function over lanes, and over modules where curves have that axis; compiled once for each."""
    if per_module:
        function = jax.vmap(function, in_axes=(None, 0, None, None, None))
    return jax.jit(jax.vmap(function, in_axes=(None, 0, 0, None, None)))


def late_fall(steps: jax.Array, early: jax.Array, horizon: jax.Array) -> jax.Array:
    """Allowed fall after the last early eval point: 1 % of the whole fall for each remaining tenth of the horizon."""
    return 0.1 * (1.0 - jnp.max(jnp.where(early, steps, 0.0)) / horizon)
