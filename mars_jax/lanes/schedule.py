"""Steps, eval points and learning-rate factors that the lanes of a group share."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from mars_jax.lanes.stopping import Patience, StoppingRule


def eval_steps(horizon: int, per_doubling: int, first: int = 4) -> list[int]:
    """Log-spaced steps of eval points, so that a convergence time has the same relative error anywhere.

    The grid is round(horizon / 2^(i / per_doubling)): it ends at the horizon, whatever that is, and the step t/2
    stands `per_doubling` places before t.

    Args:
        horizon: last step, always in the list; so is 0, the base itself.
        per_doubling: n, eval points each time the step doubles.
        first: no other eval point before this step.
    """
    steps, i = {0, horizon}, 1
    while (step := round(horizon / 2 ** (i / per_doubling))) >= first:
        steps.add(step)
        i += 1
    return sorted(steps)


@dataclass(frozen=True)
class Schedule:
    """What all lanes of a group share over time.

    Attributes:
        multipliers: factor on the learning rates at each step, [steps].
        eval_steps: steps of the eval points, rising from 0; the last is the horizon.
        per_doubling: n when the eval points are log-spaced, so that drift can be measured; 0 otherwise.
        chunk_steps: C, most steps in one call of the compiled chunk.
        stopping: what ends lanes before the horizon.
        ceiling: validation loss above which a lane has diverged, nats; see `stopping.loss_ceiling`.
        checkpoint_seconds: least time between two checkpoints.
        averaging: power n of the average of a lane's adapters that eval points read; None: the newest adapters.
        keeps_sample_losses: whether eval points keep the loss of every validation sample; see `EvalPoint`.
    """

    multipliers: np.ndarray
    eval_steps: Sequence[int]
    per_doubling: int
    chunk_steps: int
    stopping: StoppingRule = field(default_factory=Patience)
    ceiling: float = math.inf
    checkpoint_seconds: float = 10.0
    averaging: float | None = None
    keeps_sample_losses: bool = False

    @property
    def horizon(self) -> int:
        """The last step."""
        return self.eval_steps[-1]

    def newest_share(self, steps: np.ndarray) -> np.ndarray:
        """Share that the adapters after each step have in the average there, float32.

        (n + 1) / (t + n), so that weights rise as t^n (polynomial-decay averaging, Shamir and Zhang 2013): the average
        is of about the last 1/(n + 1) of the steps at any time, as suits eval points that are log-spaced.
        """
        if self.averaging is None:
            return np.ones(len(steps), np.float32)
        return ((self.averaging + 1.0) / (steps + self.averaging)).astype(np.float32)

    def has_half(self, step: int) -> bool:
        """Whether the eval point `per_doubling` places before is at half the step, to rounding."""
        place = list(self.eval_steps).index(step) - self.per_doubling
        return bool(self.per_doubling) and place >= 0 and abs(2 * self.eval_steps[place] - step) <= 1.5


def warmup_multipliers(steps: int, warmup_steps: int, shape: str) -> np.ndarray:
    """Factors on the learning rate, float32 [steps]: linear warm-up, then "constant", "linear" or "cosine" to zero.

    The last step of a fall has factor 0, so it changes nothing, and the first step of a warm-up has more than 0; in
    PyTorch's schedules, which count from 0, it is the other way round.
    """
    step = np.arange(1, steps + 1)
    rise = np.minimum(1.0, step / max(1, warmup_steps))
    part = np.clip((step - warmup_steps) / max(1, steps - warmup_steps), 0.0, 1.0)
    fall = {"constant": np.ones(steps), "linear": 1.0 - part, "cosine": 0.5 * (1.0 + np.cos(math.pi * part))}[shape]
    return (rise * fall).astype(np.float32)
