"""Which lanes share a program and a group; and the cached encoder, whose lanes learn what those that see pixels do."""

from hypothesis import given, settings
from hypothesis import strategies as st

from mars_jax.lanes.buckets import plan_buckets
from mars_jax.lanes.lane import Lane


def lane(vision, llm, num_samples=8, seed=0):
    return Lane({"vision": vision, "llm": llm}, num_samples, seed)


def flops(ranks, cached):
    """The encoder costs 100 and half of that again for its backward pass, a rank 1."""
    encoder = 0 if cached else 100 + 50 * (ranks["vision"] > 0)
    return 100 + encoder + sum(ranks.values())


def told(buckets):
    """Names, padded ranks and cache of every bucket."""
    return [([lane.name for lane in b.lanes], tuple(b.padded_ranks.values()), b.cached_encoder) for b in buckets]


def names(*lanes):
    return [lane.name for lane in lanes]


# By cost.


def test_lanes_of_the_same_ranks_share_a_bucket_whatever_a_compile_costs():
    lanes = [lane(2, 4, d, s) for d in (8, 16) for s in (0, 1)]
    assert told(plan_buckets(lanes, flops, 0.0, cacheable=True)) == [(names(*lanes), (2, 4), False)]


def test_buckets_merge_while_a_compile_costs_more_than_the_padding():
    low, high = [lane(2, 4, seed=s) for s in range(3)], lane(8, 8)
    # Merged, three lanes would be padded by 10 each.
    apart = [(names(*low), (2, 4), False), (names(high), (8, 8), False)]
    assert told(plan_buckets([*low, high], flops, 30.0, cacheable=False)) == apart
    together = [(names(*low, high), (8, 8), False)]
    assert told(plan_buckets([*low, high], flops, 30.1, cacheable=False)) == together


def test_lanes_without_an_encoder_adapter_are_kept_apart_where_the_cache_pays():
    frozen, adapted = lane(0, 4), lane(4, 4)
    # The cache saves the lane 150 of 254 FLOPs, and padding 4 more.
    assert told(plan_buckets([adapted, frozen], flops, 153.0, cacheable=True)) == [
        (names(adapted), (4, 4), False),
        (names(frozen), (0, 4), True),
    ]
    assert told(plan_buckets([adapted, frozen], flops, 155.0, cacheable=True)) == [
        (names(adapted, frozen), (4, 4), False)
    ]
    # Without a cache only the backward pass is saved.
    assert told(plan_buckets([adapted, frozen], flops, 60.0, cacheable=False)) == [
        (names(adapted, frozen), (4, 4), False)
    ]


def test_a_base_without_a_vision_module_in_the_search_may_be_cached():
    lanes = [Lane({"llm": 2}, 8, 0), Lane({"llm": 4}, 8, 0)]
    (bucket,) = plan_buckets(lanes, lambda ranks, cached: 1.0, 10.0, cacheable=True)
    assert bucket.cached_encoder


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, 2)), min_size=1, max_size=10, unique=True),
    st.floats(0.0, 1000.0),
    st.booleans(),
)
def test_every_lane_is_in_one_bucket_that_covers_it_and_none_costs_more_than_all_apart(cells, compile_flops, cacheable):
    lanes = [lane(vision, llm, seed=seed) for vision, llm, seed in cells]
    buckets = plan_buckets(lanes, flops, compile_flops, cacheable=cacheable)
    place = {lane.name: i for i, lane in enumerate(lanes)}
    order = [place[lane.name] for bucket in buckets for lane in bucket.lanes]
    assert sorted(order) == list(range(len(lanes)))
    for bucket in buckets:
        places = [place[lane.name] for lane in bucket.lanes]
        assert places == sorted(places)
        assert bucket.padded_ranks == {m: max(lane.ranks[m] for lane in bucket.lanes) for m in ("vision", "llm")}
        assert bucket.cached_encoder == (cacheable and bucket.padded_ranks["vision"] == 0)

    def cost(buckets):
        return sum(len(b.lanes) * flops(b.padded_ranks, b.cached_encoder) + compile_flops for b in buckets)

    apart = plan_buckets(lanes, flops, 0.0, cacheable=cacheable)
    assert cost(buckets) <= cost(apart) + 1e-6
