"""Which lanes share a compiled program: buckets of padded ranks, as many as are worth their compile time.

Pure: what a lane-step and a compile cost is given by the caller.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from mars_jax.lanes.lane import Lane, Ranks

LaneFlops = Callable[[Ranks, bool], float]
"""FLOPs of a lane over all its steps, from its padded ranks and whether the vision encoder's output is cached."""


@dataclass(frozen=True)
class Bucket:
    """Lanes of one program.

    Attributes:
        lanes: in the order of the plan.
        padded_ranks: module -> columns R, the largest rank of any lane.
        cached_encoder: whether the encoder's output is read from a cache, which no lane may adapt.
    """

    lanes: tuple[Lane, ...]
    padded_ranks: Mapping[str, int]
    cached_encoder: bool


def plan_buckets(
    lanes: Sequence[Lane], lane_flops: LaneFlops, compile_flops: float, *, cacheable: bool
) -> tuple[Bucket, ...]:
    """Starts with a bucket for each rank vector and merges two while that saves more than it costs.

    Args:
        lanes: all lanes, of equal length.
        lane_flops: see `LaneFlops`.
        compile_flops: the FLOPs that could be done in the time of a compile.
        cacheable: whether the encoder's output may be cached at all.
    """

    def join(members: Sequence[Lane]) -> Bucket:
        padded = {module: max(lane.ranks[module] for lane in members) for module in members[0].ranks}
        return Bucket(tuple(members), padded, cacheable and padded.get("vision", 0) == 0)

    def cost(bucket: Bucket) -> float:
        return len(bucket.lanes) * lane_flops(bucket.padded_ranks, bucket.cached_encoder) + compile_flops

    alike: dict[tuple[tuple[str, int], ...], list[Lane]] = {}
    for lane in lanes:
        alike.setdefault(tuple(lane.ranks.items()), []).append(lane)
    buckets = [join(members) for members in alike.values()]
    while len(buckets) > 1:
        merges = []
        for left, right in itertools.combinations(range(len(buckets)), 2):
            merged = join([*buckets[left].lanes, *buckets[right].lanes])
            merges.append((cost(merged) - cost(buckets[left]) - cost(buckets[right]), left, right, merged))
        saving, left, right, merged = min(merges, key=lambda merge: merge[:3])
        if saving >= 0:
            break
        buckets = [bucket for place, bucket in enumerate(buckets) if place not in (left, right)] + [merged]
    order = {lane.name: place for place, lane in enumerate(lanes)}
    in_order = [join(sorted(bucket.lanes, key=lambda lane: order[lane.name])) for bucket in buckets]
    return tuple(sorted(in_order, key=lambda bucket: order[bucket.lanes[0].name]))
