"""A lane: one training run inside a compiled program."""

from collections.abc import Mapping
from dataclasses import dataclass

Ranks = Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Lane:
    """One probe run.

    Attributes:
        ranks: module -> rank, 0 where the module is frozen.
        num_samples: D, the number of training samples it cycles through.
        seed: fixes the adapter init and the order of the data.
    """

    ranks: Ranks
    num_samples: int
    seed: int

    @property
    def name(self) -> str:
        """A readable name, unique within a plan: `vision8-projector8-llm2-D256-s0`."""
        return "-".join(
            [*(f"{module}{rank}" for module, rank in self.ranks.items()), f"D{self.num_samples}", f"s{self.seed}"]
        )

    @property
    def adapted(self) -> list[str]:
        """Modules that train."""
        return [module for module, rank in self.ranks.items() if rank]
