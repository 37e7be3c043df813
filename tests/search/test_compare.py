"""The interval of `mars compare`; the command itself runs in test_pipeline.py."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mars_jax.search.compare import paired_interval


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
