"""Which lanes a search runs and when they are looked at."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mars_jax.lanes.lane import Lane
from mars_jax.lanes.schedule import eval_steps
from mars_jax.search.probes.design import plan_lanes, probed_vectors, rank_vectors

RANKS = st.lists(st.integers(1, 64), min_size=1, max_size=5, unique=True).map(sorted)
GRIDS = st.dictionaries(st.sampled_from(["vision", "projector", "llm"]), RANKS, min_size=1)


def test_names_tell_ranks_data_and_seed():
    lane = Lane({"vision": 8, "projector": 0, "llm": 2}, 256, 1)
    assert lane.name == "vision8-projector0-llm2-D256-s1"
    assert lane.adapted == ["vision", "llm"]


def test_the_cross_design_varies_one_module_at_a_time_about_the_middle():
    vectors = rank_vectors({"vision": [2, 4, 8], "llm": [4, 8, 16]}, corners=False)
    assert sorted((v["vision"], v["llm"]) for v in vectors) == [(2, 8), (4, 4), (4, 8), (4, 16), (8, 8)]


@pytest.mark.parametrize(
    ("modules", "ranks", "cross", "corners"), [(2, 5, 9, 4), (3, 5, 13, 8), (2, 2, 3, 4), (1, 3, 3, 2)]
)
def test_the_cross_and_its_corners_count_as_they_should(modules, ranks, cross, corners):
    grids = {f"m{module}": [2**i for i in range(ranks)] for module in range(modules)}
    plain, full = rank_vectors(grids, corners=False), rank_vectors(grids, corners=True)
    ends = [dict(zip(grids, end, strict=True)) for end in itertools.product((1, 2 ** (ranks - 1)), repeat=modules)]
    assert len(plain) == cross == modules * (ranks - 1) + 1
    assert full[:cross] == plain
    assert len(ends) == 2**modules == corners if modules > 1 else corners == 2
    assert len(full) == cross + sum(end not in plain for end in ends)
    assert all(end in full for end in ends)


def test_a_module_with_one_rank_is_not_searched():
    vectors = rank_vectors({"vision": [2, 4, 8], "projector": [16], "llm": [2, 4, 8]}, corners=True)
    assert len(vectors) == 5 + 4
    assert {vector["projector"] for vector in vectors} == {16}


@given(GRIDS, st.lists(st.integers(1, 999), min_size=1, max_size=3, unique=True), st.integers(1, 3), st.booleans())
def test_lanes_are_unique_and_every_rank_meets_every_size_and_seed(grids, sizes, seeds, single):
    lanes = plan_lanes(probed_vectors(grids, single_module=single), sizes, seeds)
    assert len({lane.name for lane in lanes}) == len(lanes)
    for module, ranks in grids.items():
        cells = {(lane.ranks[module], lane.num_samples, lane.seed) for lane in lanes}
        assert cells >= set(itertools.product(ranks, sizes, range(seeds)))
    assert all(lane.adapted for lane in lanes)
    # Lanes of the same data stand together, so that they share batches.
    assert len([*itertools.groupby((lane.num_samples, lane.seed) for lane in lanes)]) == len(sizes) * seeds


def test_single_module_lanes_adapt_one_searched_module_with_every_rank():
    grids = {"vision": [2, 4], "projector": [16], "llm": [8, 16]}
    lanes = plan_lanes(probed_vectors(grids, single_module=True), [64], 1)
    single = [dict(lane.ranks) for lane in lanes if len(lane.adapted) == 1]
    assert single == [
        {"vision": 2, "projector": 0, "llm": 0},
        {"vision": 4, "projector": 0, "llm": 0},
        {"vision": 0, "projector": 0, "llm": 8},
        {"vision": 0, "projector": 0, "llm": 16},
    ]
    assert len(lanes) == 4 + len(plan_lanes(probed_vectors(grids), [64], 1))


def test_single_module_lanes_were_planned_twice_where_the_others_are_frozen_anyway():
    lanes = plan_lanes(probed_vectors({"vision": [0], "llm": [4, 8, 16]}, single_module=True), [64], 1)
    assert sorted(lane.ranks["llm"] for lane in lanes) == [4, 8, 16]


@given(horizon=st.integers(1, 100_000), n=st.integers(1, 12), first=st.integers(1, 32))
def test_looks_are_log_spaced_from_the_first_to_the_horizon(horizon, n, first):
    looks = eval_steps(horizon, n, first)
    assert looks == sorted(set(looks))
    assert looks[0] == 0
    assert looks[-1] == horizon
    inner = looks[1:-1]
    assert all(first <= step < horizon for step in inner)
    # No gap is wider than a place of the grid, to the rounding of both ends.
    for left, right in itertools.pairwise(looks[1:]):
        assert right - left <= left * (2 ** (1 / n) - 1) + 2
    # Where rounding merges no steps, t / 2 stands n places before t.
    for place, step in enumerate(inner, start=1):
        if step / 2 >= max(first, 2 * n) and place > n:
            assert abs(2 * looks[place - n] - step) <= 1.5
