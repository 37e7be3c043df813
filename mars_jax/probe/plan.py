"""Which lanes a search runs: the cross design with corners, and the steps at which every lane is looked at.

Pure and cheap: no model, no device. `probe.loop` runs what is planned here.
"""

import itertools
from collections.abc import Mapping, Sequence
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


def rank_vectors(grids: Mapping[str, Sequence[int]], corners: bool) -> list[dict[str, int]]:
    """The cross design: each module's ranks in turn with the others at their pivot (mid-grid), plus corners.

    M * |R| vectors instead of |R|^M; the corners (every combination of smallest and largest rank) test that the laws
    are separable and hold at the ends.

    Args:
        grids: module -> ranks to try; a module with one rank is not searched.
        corners: whether to add the corners.
    """
    pivot = {module: sorted(ranks)[len(ranks) // 2] for module, ranks in grids.items()}
    vectors = [pivot | {module: rank} for module, ranks in grids.items() for rank in sorted(ranks)]
    if corners:
        ends = [sorted({min(ranks), max(ranks)}) for ranks in grids.values()]
        vectors += [dict(zip(grids, corner, strict=True)) for corner in itertools.product(*ends)]
    return [dict(key) for key in dict.fromkeys(tuple(vector.items()) for vector in vectors)]


def plan_lanes(
    grids: Mapping[str, Sequence[int]],
    num_samples: Sequence[int],
    num_seeds: int,
    *,
    corners: bool = True,
    single_module: bool = False,
) -> tuple[Lane, ...]:
    """Every lane of a search, those with the same data next to each other.

    Args:
        grids: module -> ranks to try.
        num_samples: data sizes D.
        num_seeds: seeds 0..num_seeds-1 of every cell.
        corners: see `rank_vectors`.
        single_module: also run lanes that adapt one searched module only, which the `loss_fraction` rule needs.
    """
    vectors = rank_vectors(grids, corners)
    if single_module:
        searched = [module for module, ranks in grids.items() if len(ranks) > 1]
        frozen = dict.fromkeys(grids, 0)
        single = [frozen | {module: rank} for module in searched for rank in sorted(grids[module])]
        # Where every other module is frozen anyway, these lanes are there already.
        vectors += [vector for vector in single if vector not in vectors]
    return tuple(
        Lane(vector, size, seed)
        for size in sorted(num_samples, reverse=True)
        for seed in range(num_seeds)
        for vector in vectors
    )


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
