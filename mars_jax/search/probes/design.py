"""Which lanes the probe phase runs: the cross design with corners, and the prefixes that are read off each lane.

Pure and cheap: no model, no device.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace

from mars_jax.config.load import Config
from mars_jax.lanes.lane import Lane, Ranks
from mars_jax.laws.convergence.registry import RULES
from mars_jax.search.strategies.registry import STRATEGIES


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


def single_module_vectors(grids: Mapping[str, Sequence[int]]) -> list[dict[str, int]]:
    """Rank vectors that adapt one searched module and freeze the others."""
    frozen = dict.fromkeys(grids, 0)
    searched = [module for module, ranks in grids.items() if len(ranks) > 1]
    return [frozen | {module: rank} for module in searched for rank in sorted(grids[module])]


def probed_vectors(
    grids: Mapping[str, Sequence[int]], *, corners: bool = True, single_module: bool = False
) -> list[dict[str, int]]:
    """Rank vectors of the probes.

    Args:
        grids: module -> ranks to try.
        corners: see `rank_vectors`.
        single_module: also those that adapt one searched module only, which some convergence rules need.
    """
    vectors = rank_vectors(grids, corners)
    if single_module:
        # Where every other module is frozen anyway, these lanes are there already.
        vectors += [vector for vector in single_module_vectors(grids) if vector not in vectors]
    return vectors


def plan_lanes(vectors: Sequence[Ranks], sizes: Sequence[int], num_seeds: int) -> tuple[Lane, ...]:
    """Every lane of a search, those with the same data next to each other.

    Args:
        vectors: rank vectors.
        sizes: data sizes D.
        num_seeds: seeds 0..num_seeds-1 of every cell.
    """
    return tuple(
        Lane(vector, size, seed)
        for size in sorted(sizes, reverse=True)
        for seed in range(num_seeds)
        for vector in vectors
    )


def design(config: Config) -> list[dict[str, int]]:
    """Rank vectors of a config's probes; none where neither its strategy nor a convergence rule asks for any."""
    rule, probes = config.convergence.rule, STRATEGIES[config.selection.method].probes
    if probes == "losses":
        return whole_design(config)
    if probes == "none" or rule is None:
        return []
    # Frozen modules and learning rates are left to final runs.
    grids = {module: tuple(rank for rank in grid if rank) or (0,) for module, grid in config.lora.grids.items()}
    single = RULES[rule].needs_single_module
    return single_module_vectors(grids) if single else probed_vectors(grids, corners=config.probe.corners)


def whole_design(config: Config) -> list[dict[str, int]]:
    """The rank vectors that stand for a config's grid, and those that its convergence rule needs."""
    rule = config.convergence.rule
    single = rule is not None and RULES[rule].needs_single_module
    return probed_vectors(config.lora.grids, corners=config.probe.corners, single_module=single)


def planned_lanes(config: Config) -> tuple[Lane, ...]:
    """The lanes of a config; with nested sampling those of the largest D, which are read at every D."""
    settings = config.probe
    sizes = settings.num_samples[-1:] if settings.sampling == "nested" else settings.num_samples
    return plan_lanes(design(config), sizes, settings.seeds)


def prefixes(config: Config, lane: Lane) -> list[tuple[Lane, int]]:
    """Lanes that are read off a lane, one for each D, and their numbers of steps."""
    settings = config.probe
    if settings.sampling == "separate":
        return [(lane, settings.horizon)]
    return [(replace(lane, num_samples=size), size // settings.batch_size) for size in reversed(settings.num_samples)]


def run_of(config: Config, lane: Lane) -> str:
    """Name of the training run that a lane is read off: of the lane at the largest D, where sampling is nested."""
    settings = config.probe
    return (replace(lane, num_samples=settings.num_samples[-1]) if settings.sampling == "nested" else lane).name
