"""The interval of `mars compare`; the command itself runs in test_pipeline.py."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mars_jax.lanes.stopping import until_stopped
from mars_jax.search.compare import paired_interval
from mars_jax.search.strategies import tpe


def test_the_interval_covers_the_mean_difference_a_token_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(300):
        tokens = rng.integers(1, 5, 200)
        differences = tokens * 0.3 + rng.normal(size=200)
        low, high = paired_interval(differences, tokens, seed=trial)
        covered += low <= 0.3 <= high
    assert 0.91 <= covered / 300 <= 0.985


@settings(deadline=None, max_examples=20)
@given(st.lists(st.tuples(st.floats(-5, 5), st.integers(1, 9)), min_size=1, max_size=30))
def test_the_interval_holds_no_more_than_the_samples_do(samples):
    differences, tokens = (np.asarray(column, float) for column in zip(*samples, strict=True))
    low, high = paired_interval(differences, tokens, seed=0)
    each = differences / tokens
    assert each.min() - 1e-9 <= low <= high <= each.max() + 1e-9


def test_equal_losses_leave_no_interval():
    assert paired_interval(np.zeros(7), np.ones(7), seed=0) == pytest.approx((0.0, 0.0))


GRIDS = {"vision": [2, 4, 8, 16, 32], "llm": [2, 4, 8, 16, 32]}


def test_tpe_asks_once_for_each_pair_and_finds_a_minimum_that_chance_rarely_does():
    def loss(ranks):
        return (np.log2(ranks["vision"]) - 2) ** 2 + (np.log2(ranks["llm"]) - 4) ** 2

    asked = []

    def train(ranks, goes_on):
        asked.append(ranks)
        return until_stopped([(step, loss(ranks) + 16 / (1 + step)) for step in range(0, 17, 2)], goes_on)

    best, stopped = [], 0
    for seed in range(5):
        asked.clear()
        runs = tpe.search(GRIDS, 16, 12 * 16, seed, train)
        assert [run.ranks for run in runs] == asked
        assert len({tuple(ranks.values()) for ranks in asked}) == len(asked)
        # The last one may exceed the budget.
        assert sum(run.steps for run in runs[:-1]) < 12 * 16
        assert {run.steps for run in runs} <= {4, 8, 16}  # rungs
        best.append(min(loss(run.ranks) for run in runs))
        stopped += sum(run.steps < 16 for run in runs)
        # None of the best was stopped. (Optuna counts what it suggests again among the half that goes on.)
        for place, run in enumerate(runs):
            if run.steps < 16:
                there = [loss(other.ranks) for other in runs[:place] if other.steps >= run.steps]
                assert sum(other <= loss(run.ranks) for other in there) >= len(there) / 4
        assert tpe.search(GRIDS, 16, 12 * 16, seed, train) == runs
    assert stopped > 10
    assert np.mean(best) <= 1.0  # the mean over pairs is 4


def test_tpe_goes_on_after_runs_that_diverged():
    def train(ranks, goes_on):
        return until_stopped([(0, 2.0), (4, math.inf)] if ranks["llm"] > 4 else [(0, 2.0), (16, 1.0)], goes_on)

    runs = tpe.search(GRIDS, 16, 6 * 16, 0, train)
    assert sum(run.steps == 16 for run in runs) >= 4
    assert any(run.steps == 4 for run in runs)


def test_tpe_ends_when_all_pairs_were_run():
    runs = tpe.search({"llm": [2, 8]}, 4, 100.0, 0, lambda ranks, goes_on: [(0, 2.0), (4, 1.0 / ranks["llm"])])
    assert sorted(run.ranks["llm"] for run in runs) == [2, 8]
