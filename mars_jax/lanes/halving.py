"""Successive halving: how many candidates go on at which step, and which. Pure; candidates are the caller's."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from mars_jax.errors import ConfigError


class Rung(NamedTuple):
    """One rung of successive halving: train `lanes` candidates up to `steps`, then keep `survivors`."""

    lanes: int
    steps: int
    survivors: int


def halving_schedule(lanes: int, steps: int) -> tuple[Rung, ...]:
    """Rungs of successive halving (Jamieson and Talwalkar 2016): half the lanes go on, for twice the steps.

    Args:
      lanes: candidates at the start.
      steps: optimizer steps of the last rung.

    Returns:
      The rungs, in order; `steps` counts from the start of training, and the last rung leaves one survivor.
    """
    if lanes < 1 or steps < 1:
        raise ConfigError(f"successive halving got {lanes} lanes and {steps} steps; allowed: 1 or more of each.")
    count = max(1, math.ceil(math.log2(lanes)))
    sizes = [lanes]
    while len(sizes) <= count:
        sizes.append(math.ceil(sizes[-1] / 2))
    return tuple(Rung(sizes[i], max(1, math.ceil(steps / 2 ** (count - 1 - i))), sizes[i + 1]) for i in range(count))


def lane_steps(rungs: Sequence[Rung]) -> int:
    """Optimizer steps of all lanes together."""
    starts = [0, *(rung.steps for rung in rungs)]
    return sum(rung.lanes * (rung.steps - start) for rung, start in zip(rungs, starts, strict=False))


def survivors(losses: Sequence[float], keep: int) -> tuple[int, ...]:
    """Indices of the `keep` smallest losses, best first; losses that are not finite never survive."""
    finite = [i for i, loss in enumerate(losses) if math.isfinite(loss)]
    return tuple(sorted(finite, key=lambda i: losses[i])[:keep])
