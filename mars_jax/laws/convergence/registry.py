"""When has a module (or a lane) converged? Rules that read curves and return steps, nothing else.

No training, no measuring of the curves and no fitting of laws happens here. A rule is data (`ConvergenceRule`); the
function of each rule is pure and jitted, and `_RULES` is the one place that a new rule is added to.

Every rule returns a `Convergence`. Three outcomes are kept apart:
- converged: `steps` is the convergence time, `censored` is False;
- censored: it had not converged at its horizon, so `steps` is the horizon, a lower bound, and `censored` is True;
- undefined: the curve is not finite, or there was nothing to converge to; `steps` is NaN and `censored` is False.
"""

from collections.abc import Callable

import jax
import numpy as np
from jax.typing import ArrayLike

from mars_jax.laws.convergence.base import Convergence, ConvergenceRule
from mars_jax.laws.convergence.drift import drift
from mars_jax.laws.convergence.loss_fraction import loss_fraction
from mars_jax.laws.convergence.splice import splice


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


_Rule = Callable[[ArrayLike, ArrayLike, ArrayLike, ArrayLike, ArrayLike], Convergence]
_RULES: dict[str, tuple[_Rule, tuple[str, ...]]] = {
    "loss_fraction": (loss_fraction, ("K", "N")),
    "splice": (splice, ("K", "M", "N")),
    "drift": (drift, ("K", "M", "N")),
}
