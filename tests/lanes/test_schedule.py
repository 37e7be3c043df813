"""Eval points of a horizon: what the drift rule needs of them, whatever the number of steps."""

from hypothesis import given
from hypothesis import strategies as st

from mars_jax.lanes.schedule import eval_steps


@given(st.integers(1, 12).flatmap(lambda n: st.tuples(st.just(n), st.integers(2 * n + 8, 5000))))
def test_a_horizon_off_the_powers_of_two_has_an_eval_point_at_half_of_every_late_step(case):
    # With a grid counted from 1, most horizons (such as 100) ended on a step without one: its drift was NaN, and every
    # module of every lane came out undefined.
    per_doubling, horizon = case
    steps = eval_steps(horizon, per_doubling)
    halves = [
        place >= per_doubling and abs(2 * steps[place - per_doubling] - step) <= 1.5 for place, step in enumerate(steps)
    ]
    assert halves[-1]
    assert all(halves[halves.index(True) :])
