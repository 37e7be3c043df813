"""How much a config plans: counted from its settings, so that too much is refused before any of it is listed."""

import math
from collections.abc import Mapping, Sequence

from mars_jax.config.fields import MAX_LANES

MAX_COMBINATIONS = 100_000
MAX_EVAL_POINTS = 100_000  # of one final run


def check_lanes(
    grids: Mapping[str, Sequence[int]],
    factors: Mapping[str, Sequence[float]],
    corners: bool,
    single_module: bool,
    sizes: int,
    seeds: int,
) -> None:
    """Refuses a search of too many lanes, or of too many combinations of ranks and rates.

    Args:
        grids: module -> ranks to try.
        factors: module -> factors on its learning rate to try.
        corners: whether every combination of smallest and largest ranks is probed.
        single_module: whether lanes that adapt one module alone are probed too.
        sizes: number of data sizes D that have lanes of their own.
        seeds: runs of each.

    Raises:
        ValueError: it plans more than `MAX_LANES` or `MAX_COMBINATIONS`.
    """
    combinations = math.prod(map(len, [*grids.values(), *factors.values()]))
    vectors = most_vectors(grids, corners, single_module)
    lanes = vectors * sizes * seeds
    if lanes > MAX_LANES:
        raise ValueError(
            f"up to {lanes:,} lanes are planned ({vectors:,} rank vectors, {sizes} data sizes, {seeds} "
            f"seeds); at most {MAX_LANES:,} are allowed. Give lora.modules fewer ranks or modules, or lower "
            "probe.num_samples or probe.seeds; probe.corners: false plans fewer too"
        )
    if combinations > MAX_COMBINATIONS:
        raise ValueError(
            f"lora.modules has {combinations:,} combinations of ranks and rates to choose from; at most "
            f"{MAX_COMBINATIONS:,} are allowed. Give fewer"
        )


def most_vectors(grids: Mapping[str, Sequence[int]], corners: bool, single_module: bool) -> int:
    """Number of rank vectors of the probes, or a few more where corners lie on the cross; arguments as above."""
    searched = [ranks for ranks in grids.values() if len(ranks) > 1]
    cross = 1 + sum(len(ranks) - 1 for ranks in searched) + (2 ** len(searched) if corners else 0)
    # Where every other module is frozen, lanes that adapt one module alone are there already.
    alone = single_module and sum(max(ranks) > 0 for ranks in grids.values()) > 1
    return min(cross, math.prod(map(len, searched))) + (sum(map(len, searched)) if alone else 0)


def check_eval_points(steps: int, look_every: int) -> None:
    """Refuses a final run of too many eval points.

    Raises:
        ValueError: it plans more than `MAX_EVAL_POINTS`.
    """
    if steps // look_every > MAX_EVAL_POINTS:
        raise ValueError(
            f"{steps:,} steps with an eval point every {look_every} are {steps // look_every:,} eval points; at most "
            f"{MAX_EVAL_POINTS:,} are allowed. Raise look_every or lower steps"
        )
