"""What all strategies share: the space they search, what they may spend, and what they come to."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Literal, Protocol

from mars_jax.lanes.lane import Ranks
from mars_jax.laws.fit import Laws
from mars_jax.laws.records import LaneRecord
from mars_jax.search.selection import Selection
from mars_jax.search.trainer import Configuration, Curve, Trainer, distinct


@dataclass(frozen=True)
class Space:
    """What can be chosen, and for which final run.

    Attributes:
        grids: module -> ranks to choose among, rising; a module with one rank is carried through, 0 freezes it.
        num_samples: D of the final run.
        steps: its optimizer steps.
        probed: rank vectors of the probes' design.
        sizes: numbers of samples D of the probes.
        parameters_per_rank: module -> trainable parameters of one rank.
        rates: module -> learning rate of the final run.
        fit: laws of the probes' records.
        most_together: final runs that one stopping rule can decide over.
        seed: of strategies that draw.
        factors: module -> factors on its learning rate to choose among, rising; the others keep theirs.
        only: names of the configurations that may be chosen; None: all combinations.
    """

    grids: Mapping[str, Sequence[int]]
    num_samples: int
    steps: int
    probed: Sequence[Ranks]
    sizes: Sequence[int]
    parameters_per_rank: Mapping[str, int]
    rates: Mapping[str, float]
    fit: Callable[[Sequence[LaneRecord]], Laws]
    most_together: int
    seed: int = 0
    factors: Mapping[str, Sequence[float]] = field(default_factory=dict)
    only: frozenset[str] | None = None

    @property
    def searched(self) -> list[str]:
        """Modules with ranks to choose from."""
        return [module for module, ranks in self.grids.items() if len(ranks) > 1]

    @property
    def adapted(self) -> dict[str, Sequence[int]]:
        """The grids of modules that are not frozen."""
        return {module: ranks for module, ranks in self.grids.items() if max(ranks) > 0}

    @property
    def middle(self) -> Configuration:
        """The middle rank of every grid, at the usual rates."""
        return self.configuration({module: sorted(grid)[len(grid) // 2] for module, grid in self.grids.items()})

    def configuration(self, ranks: Ranks, factors: Mapping[str, float] | None = None) -> Configuration:
        """Ranks and factors of some modules, with the ranks that the others have in any case and their usual factors.

        The usual factor of a module is that nearest to 1. A frozen module has none.
        """
        whole = {module: ranks.get(module, grid[0]) for module, grid in self.grids.items()}
        usual = {module: min(grid, key=lambda factor: abs(math.log(factor))) for module, grid in self.factors.items()}
        chosen = {**usual, **(factors or {})}
        return Configuration(whole, {m: factor for m, factor in chosen.items() if factor != 1.0 and whole[m]})

    def every(self) -> list[Configuration]:
        """All configurations that may be chosen; without those that train no module."""
        rates = [dict(zip(self.factors, chosen, strict=True)) for chosen in product(*self.factors.values())]
        vectors = [dict(zip(self.grids, ranks, strict=True)) for ranks in product(*self.grids.values())]
        every = [self.configuration(ranks, factors) for ranks in vectors if any(ranks.values()) for factors in rates]
        # The rates of a frozen module change nothing.
        return [one for one in distinct(every) if self.only is None or one.name in self.only]

    def parameters(self, configuration: Configuration) -> int:
        """Trainable parameters of a configuration."""
        return sum(rank * self.parameters_per_rank[module] for module, rank in configuration.ranks.items())

    def of_adapted(self, ranks: Ranks) -> dict[str, int]:
        """Ranks without the frozen modules."""
        return {module: ranks[module] for module in self.adapted}


Probes = Literal["losses", "convergence", "none"]
"""What probes are run for: `losses` and convergence times of ranks, which the strategy picks by; `convergence` times
alone, which are shown beside its pick, where the config has a convergence rule; `none`."""

DEFAULT_RUNS = 4
"""Final runs that a strategy begins where the config has no number."""


@dataclass(frozen=True)
class Budget:
    """What a strategy may spend.

    Attributes:
        runs: final runs, each of the space's steps, stopped ones counted by their steps; None: the strategy's default.
    """

    runs: int | None = None


@dataclass(frozen=True)
class Outcome:
    """What a strategy came to.

    Attributes:
        selection: the pick, and why.
        final: its final run, if the strategy trained it.
        curves: all final runs that were trained, its own among them.
    """

    selection: Selection
    final: Curve | None = None
    curves: tuple[Curve, ...] = ()


class Strategy(Protocol):
    """How ranks and rates are chosen. One stateless object each."""

    @property
    def name(self) -> str:
        """What configs say."""
        ...

    @property
    def probes(self) -> Probes:
        """What is probed before it; where nothing is, the phases before it are left out."""
        ...

    @property
    def takes_budget(self) -> bool:
        """Whether it begins final runs of its own, whose number a config may set."""
        ...

    @property
    def needs_convergence(self) -> bool:
        """Whether it cannot do without convergence times, and so without a convergence rule."""
        ...

    def begins(self, space: Space, budget: Budget) -> int:
        """Final runs that it begins, at most; those that only train its pick are not counted."""
        ...

    def search(self, space: Space, trainer: Trainer, budget: Budget) -> Outcome:
        """Picks from the space.

        Raises:
            NoValidResultError: nothing that it trained or fitted allows a pick.
        """
        ...
