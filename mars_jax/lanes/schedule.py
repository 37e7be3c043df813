"""Steps, eval points and learning-rate factors that the lanes of a group share."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from mars_jax.lanes.stopping import Leaving


def look_steps(horizon: int, looks_per_doubling: int, first: int = 4) -> list[int]:
    """Steps at which lanes are looked at: log-spaced, so that a convergence time has the same relative error anywhere.

    The grid is round(horizon / 2^(i / looks_per_doubling)): it ends at the horizon, whatever that is, and the step t/2
    stands `looks_per_doubling` places before t.

    Args:
        horizon: last step, always in the list; so is 0, the base itself.
        looks_per_doubling: n.
        first: no other look before this step.
    """
    steps, i = {0, horizon}, 1
    while (step := round(horizon / 2 ** (i / looks_per_doubling))) >= first:
        steps.add(step)
        i += 1
    return sorted(steps)


@dataclass(frozen=True)
class Schedule:
    """What all lanes of a group share over time.

    Attributes:
        multipliers: factor on the learning rates at each step, [steps].
        looks: steps at which lanes are looked at, rising from 0; the last is the horizon.
        looks_per_doubling: n when the looks are log-spaced, so that drift can be told; 0 otherwise.
        chunk_steps: C, most steps in one call of the compiled chunk.
        leaving: when a lane leaves before the horizon.
        checkpoint_seconds: least time between two checkpoints.
        averaging: power n of the average of a lane's adapters that looks read; None: they read the newest adapters.
    """

    multipliers: np.ndarray
    looks: Sequence[int]
    looks_per_doubling: int
    chunk_steps: int
    leaving: Leaving = field(default_factory=Leaving)
    checkpoint_seconds: float = 10.0
    averaging: float | None = None

    @property
    def horizon(self) -> int:
        """The last step."""
        return self.looks[-1]

    def newest_share(self, steps: np.ndarray) -> np.ndarray:
        """Share that the adapters after each step have in the average there, float32.

        (n + 1) / (t + n), so that weights rise as t^n (polynomial-decay averaging, Shamir and Zhang 2013): the average
        is of about the last 1/(n + 1) of the steps at any time, as suits looks that are log-spaced.
        """
        if self.averaging is None:
            return np.ones(len(steps), np.float32)
        return ((self.averaging + 1.0) / (steps + self.averaging)).astype(np.float32)


def warmup_multipliers(steps: int, warmup_steps: int, shape: str) -> np.ndarray:
    """Factors on the learning rate, float32 [steps]: linear warm-up, then "constant", "linear" or "cosine" to zero."""
    step = np.arange(1, steps + 1)
    rise = np.minimum(1.0, step / max(1, warmup_steps))
    part = np.clip((step - warmup_steps) / max(1, steps - warmup_steps), 0.0, 1.0)
    fall = {"constant": np.ones(steps), "linear": 1.0 - part, "cosine": 0.5 * (1.0 + np.cos(math.pi * part))}[shape]
    return (rise * fall).astype(np.float32)


def has_half(schedule: Schedule, look: int) -> bool:
    """Whether the look `looks_per_doubling` places before is at half the step, to rounding."""
    place = list(schedule.looks).index(look) - schedule.looks_per_doubling
    return bool(schedule.looks_per_doubling) and place >= 0 and abs(2 * schedule.looks[place] - look) <= 1.5
