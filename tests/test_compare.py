"""The interval of `mars compare`; the command itself runs in test_pipeline.py."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mars_jax import tpe
from mars_jax.compare import paired_interval


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

    found = []
    for seed in range(5):
        asked = []
        runs = tpe.suggested(GRIDS, 12, seed, lambda ranks, asked=asked: asked.append(ranks) or loss(ranks))
        assert runs == asked
        assert len({tuple(ranks.values()) for ranks in runs}) == len(runs) <= 12
        found.append(min(map(loss, runs)))
        again = tpe.suggested(GRIDS, 12, seed, loss)
        assert again == runs
    assert np.mean(found) <= 1.0  # the mean over pairs is 4


def test_tpe_goes_on_after_runs_that_diverged():
    runs = tpe.suggested(GRIDS, 6, 0, lambda ranks: None if ranks["llm"] > 4 else 1.0)
    assert len(runs) == 6
