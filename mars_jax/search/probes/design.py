"""Which lanes a search runs: the cross design with corners, and the steps at which every lane is looked at.

Pure and cheap: no model, no device. `lanes.loop` runs what is planned here.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace

from mars_jax.config.load import Config
from mars_jax.lanes.lane import Lane


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


def planned_lanes(config: Config) -> tuple[Lane, ...]:
    """The lanes of a config; with nested sampling those of the largest D, which are read at every D."""
    settings = config.probe
    return plan_lanes(
        {name: module.ranks for name, module in config.lora.modules.items()},
        settings.num_samples[-1:] if settings.sampling == "nested" else settings.num_samples,
        settings.seeds,
        corners=settings.corners,
        single_module=config.convergence.rule == "loss_fraction",
    )


def readings(config: Config, lane: Lane) -> list[tuple[Lane, int]]:
    """What is read off a lane: a lane for each D, and its number of steps."""
    settings = config.probe
    if settings.sampling == "separate":
        return [(lane, settings.horizon)]
    return [(replace(lane, num_samples=size), size // settings.batch_size) for size in reversed(settings.num_samples)]


def sweep_size(config: Config, lanes: Sequence[Lane]) -> int:
    """Final runs that are begun: as many as the sweep takes of the rank vectors that adapt all modules; else one."""
    if config.selection.method != "laws":
        return 1
    most = max(len(lane.adapted) for lane in lanes)
    joint = {tuple(lane.ranks.items()) for lane in lanes if len(lane.adapted) == most}
    return min(config.selection.sweep, config.probe.lanes_per_program, len(joint))
