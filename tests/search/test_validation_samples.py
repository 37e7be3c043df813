"""The looks of a horizon: what the drift rule needs of them, whatever the number of steps."""

from hypothesis import given
from hypothesis import strategies as st

from mars_jax.lanes.schedule import look_steps


@given(st.integers(1, 12).flatmap(lambda n: st.tuples(st.just(n), st.integers(2 * n + 8, 5000))))
def test_a_horizon_off_the_powers_of_two_has_a_look_at_half_of_every_late_step(case):
    # With a grid counted from 1, most horizons (such as 100) ended on a step without one: its drift was NaN, and every
    # module of every lane came out undefined.
    looks_per_doubling, horizon = case
    looks = look_steps(horizon, looks_per_doubling)
    halves = [
        place >= looks_per_doubling and abs(2 * looks[place - looks_per_doubling] - step) <= 1.5
        for place, step in enumerate(looks)
    ]
    assert halves[-1]
    assert all(halves[halves.index(True) :])
