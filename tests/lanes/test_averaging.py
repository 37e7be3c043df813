"""The average of adapters that looks read: what it is the mean of, and that it changes nothing but what looks see."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import tiny_lanes
from tests.helpers.tiny_lanes import LANES, assert_same, schedule

STEPS = 6


def run(initial=None, **changes):
    return tiny_lanes.run(LANES[:2], tiny_lanes.padded_engine(), schedule([0, 4, STEPS], **changes), initial=initial)


@pytest.fixture(scope="module")
def newest():
    """A lane's adapters after every step, without an average."""
    timing = schedule([0, STEPS])
    ends = [tiny_lanes.run(LANES[:2], tiny_lanes.padded_engine(), cut(timing, t)) for t in range(1, STEPS + 1)]
    return [np.asarray(end.lane_state(0).trainable) for end in ends]


def cut(timing, steps):
    return schedule([0, steps], multipliers=timing.multipliers[:steps])


@pytest.mark.parametrize(
    ("averaging", "weights"), [(0.0, [1] * 6), (1.0, [1, 2, 3, 4, 5, 6]), (2.0, [1, 3, 6, 10, 15, 21])]
)
def test_looks_read_the_mean_of_the_adapters_with_weights_that_rise_as_a_power_of_the_step(averaging, weights, newest):
    averaged = run(averaging=averaging)
    expected = np.average(newest, axis=0, weights=weights)
    np.testing.assert_allclose(averaged.lane_state(0).average, expected, rtol=0, atol=1e-6)
    assert averaged.lane_state(0).best_step == STEPS
    assert_same(averaged.lane_state(0).best, averaged.lane_state(0).average)
    from_the_mean = run(initial={0: np.asarray(averaged.lane_state(0).average)})
    assert averaged.points[0][-1].validation_loss == pytest.approx(from_the_mean.points[0][0].validation_loss)


def test_an_average_changes_no_step():
    averaged, plain = run(averaging=2.0), run()
    for name in ("trainable", "optimizer"):
        assert_same(getattr(averaged.state, name), getattr(plain.state, name))
    assert [row.train_loss for row in averaged.points[0]] == [row.train_loss for row in plain.points[0]]


def test_without_averaging_looks_read_the_newest_adapters_bit_for_bit():
    state = run().lane_state(0)
    assert_same(state.average, state.trainable)


@given(averaging=st.floats(0.0, 50.0), steps=st.integers(1, 200))
def test_shares_of_the_newest_are_those_of_a_mean(averaging, steps):
    shares = schedule([0, steps], averaging=averaging).newest_share(np.arange(1, steps + 1))
    assert shares[0] == 1.0
    assert ((shares > 0) & (shares <= 1)).all()
    assert (np.diff(shares) <= 0).all()


def test_a_lane_that_stops_being_finite_keeps_its_average():
    rates = dict.fromkeys(tiny_lanes.RATES, 1e30)
    result = tiny_lanes.run(LANES[:1], tiny_lanes.padded_engine(), schedule([0, 4, STEPS], averaging=2.0), rates=rates)
    state = jax.device_get(result.lane_state(0))
    assert not result.points[0][-1].alive
    assert np.isfinite(state.best).all()
