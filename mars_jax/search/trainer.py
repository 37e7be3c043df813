"""What trains the configurations that a strategy asks for: real lanes, or recorded curves.

A strategy sees a `Trainer` alone, so the run, `mars compare` and the evidence replay the same strategies.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from mars_jax.lanes.eval_points import EvalPoint, best_loss
from mars_jax.lanes.lane import Ranks
from mars_jax.lanes.stopping import StoppingRule
from mars_jax.laws.records import LaneRecord
from mars_jax.runtime.trees import Tree


@dataclass(frozen=True)
class Configuration:
    """Ranks and learning-rate factors of a final run.

    Attributes:
        ranks: module -> rank, 0 where the module is frozen.
        factors: module -> factor on its learning rate, for those where it isn't 1.
        seed: added to the config's for the draw of the adapters.
    """

    ranks: Ranks
    factors: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0

    @property
    def name(self) -> str:
        """Readable, and unique within a search."""
        ranks = "-".join(f"{module}{rank}" for module, rank in self.ranks.items())
        rates = "".join(f"-{module}x{factor!r}" for module, factor in self.factors.items())
        return ranks + rates + (f"-seed{self.seed}" if self.seed else "")


def distinct(configurations: Iterable[Configuration]) -> list[Configuration]:
    """Configurations without repeats, in the same order."""
    return list({configuration.name: configuration for configuration in configurations}.values())


@dataclass(frozen=True)
class Curve:
    """A final run, to its end or to where it was stopped.

    Attributes:
        configuration: what was trained.
        points: its eval points.
        adapters: makes its adapters at the lowest validation loss; None for a recorded curve.
        start: name of the probe whose adapters it started from; None for a fresh draw.
    """

    configuration: Configuration
    points: tuple[EvalPoint, ...]
    adapters: Callable[[], Tree] | None = None
    start: str | None = None

    @property
    def steps(self) -> int:
        """Steps that it had."""
        return self.points[-1].step

    @property
    def loss(self) -> float:
        """Its lowest validation loss, nats a token; infinite if it diverged."""
        return best_loss(self.points, self.steps)

    @property
    def reason(self) -> str | None:
        """Why it diverged; None if it did not."""
        return self.points[-1].reason


class Trainer(Protocol):
    """Runs probes and final runs."""

    def probe(self, configurations: Sequence[Ranks], sizes: Sequence[int]) -> list[LaneRecord]:
        """Probes of rank vectors at numbers of samples D; those that ran before are not run again."""
        ...

    def train(self, configurations: Sequence[Configuration], stopping: StoppingRule) -> list[Curve]:
        """Final runs under a stopping rule, which decides over all of them together."""
        ...


def best_curve(curves: Sequence[Curve], steps: int) -> Curve | None:
    """The curve with the lowest loss of those that came to the end, `steps`; None where none did."""
    ended = [curve for curve in curves if curve.steps == steps and math.isfinite(curve.loss)]
    return min(ended, key=lambda curve: curve.loss, default=None)
