"""The convergence rules, on curves whose times are known."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mars_jax.errors import ConfigError
from mars_jax.laws.convergence.base import ConvergenceRule, converge

LOSS = ConvergenceRule("loss_fraction", 0.1, 3)
DRIFT = ConvergenceRule("drift", 0.1, 3)
STEPS = np.arange(0, 1001, 20)


def decay(tau, floor=1.0, drop=2.0, rise=0.0):
    """Falls by `drop` with time constant `tau`, then rises again (over-fitting) from step 600 on."""
    return floor + drop * np.exp(-STEPS / tau) + rise * np.maximum(STEPS - 600, 0) / 400 + 1e-4 * (STEPS == 1000)


def test_loss_fraction_times_of_exponentials():
    curves = np.stack([decay(20.0), decay(60.0)])
    found = converge(LOSS, STEPS, curves)
    # exp(-t / tau) = 0.1 at t = tau * log(10); the eval points are 20 steps apart and the curve is convex between them.
    np.testing.assert_allclose(found.steps, np.log(10) * np.array([20.0, 60.0]), atol=4.0)
    assert not np.any(found.censored)


def test_loss_fraction_interpolates_linearly_between_eval_points():
    losses = np.array([[1.0, 0.6, 0.2, 0.0, 0.1, 0.2]])
    found = converge(ConvergenceRule("loss_fraction", 0.4, 1), np.arange(6) * 10, losses)
    assert float(found.steps[0]) == pytest.approx(15.0)


def test_over_fitting_after_the_best_step_does_not_undo_convergence():
    plain, over_fitted = decay(40.0), decay(40.0, rise=3.0)
    found = converge(LOSS, STEPS, np.stack([plain, over_fitted]))
    np.testing.assert_allclose(found.steps[0], found.steps[1], rtol=1e-3)
    assert not np.any(found.censored)


def test_a_bump_before_the_best_step_postpones_convergence():
    bump = decay(40.0) + 1.0 * (STEPS == 400)
    found = converge(LOSS, STEPS, bump[None, :])
    assert 400 < float(found.steps[0]) <= 420


def test_still_falling_at_the_horizon_is_censored():
    found = converge(LOSS, STEPS, np.stack([decay(1000.0), decay(300.0), decay(30.0)]))
    np.testing.assert_array_equal(found.censored, [True, True, False])
    np.testing.assert_array_equal(found.steps[:2], [1000.0, 1000.0])


def test_best_step_last_but_almost_flat_is_converged():
    losses = np.concatenate([decay(30.0)[:-1], [0.9999]])
    found = converge(LOSS, STEPS, losses[None, :])
    assert not bool(found.censored[0])


def test_too_few_looks_after_the_crossing_are_censored():
    losses = np.array([[1.0, 1.0, 1.0, 0.0, 0.5]])
    steps = np.array([0, 10, 20, 30, 31])
    assert bool(converge(ConvergenceRule("loss_fraction", 0.1, 3), steps, losses).censored[0])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_curve_that_is_not_finite_is_undefined_not_zero(bad):
    losses = decay(30.0)
    losses[30] = bad
    found = converge(LOSS, STEPS, losses[None, :])
    assert np.isnan(found.steps[0])
    assert not bool(found.censored[0])


def test_a_lane_that_never_improved_is_undefined():
    found = converge(LOSS, STEPS, np.stack([1.0 + STEPS / 1000.0, np.ones_like(STEPS, dtype=float)]))
    assert np.all(np.isnan(found.steps))
    assert not np.any(found.censored)


GRID = 10.0 * 2.0 ** (np.arange(29) / 4)  # ratio 2**(1/4): t/2 lies four eval points before
NO_HALF = np.full(4, np.nan)


def drift_of_power(exponent):
    """Drift of an update that saturates as 1 - (t/10)**-exponent: falls for ever, so the crossing is known."""
    return np.concatenate([NO_HALF, (GRID[4:] / 10.0) ** -exponent])


def test_drift_times_per_module():
    drifts = np.stack([drift_of_power(1.0), drift_of_power(0.6)])[None]
    found = converge(DRIFT, GRID, drifts)
    np.testing.assert_allclose(found.steps[0], [100.0, 10.0 ** (1 + 1 / 0.6)], rtol=0.01)
    assert not np.any(found.censored)


def test_drift_must_stay_below():
    drift = drift_of_power(1.0)
    drift[20] = 0.5
    found = converge(DRIFT, GRID, drift[None, None, :])
    assert GRID[20] < float(found.steps[0, 0]) <= GRID[21]


def test_drift_is_censored_without_sustain():
    drift = np.concatenate([NO_HALF, np.ones(23), np.full(2, 0.01)])
    found = converge(DRIFT, GRID, drift[None, None, :])
    assert bool(found.censored[0, 0])
    assert float(found.steps[0, 0]) == pytest.approx(GRID[-1])
    assert not bool(converge(ConvergenceRule("drift", 0.1, 2), GRID, drift[None, None, :]).censored[0, 0])


def test_drift_of_a_module_that_did_not_move_or_diverged_is_undefined():
    diverged = drift_of_power(1.0)
    diverged[-1] = np.nan
    exploded = drift_of_power(1.0)
    exploded[10] = np.inf
    found = converge(DRIFT, GRID, np.stack([np.full(29, np.nan), diverged, exploded])[None])
    assert np.all(np.isnan(found.steps))
    assert not np.any(found.censored)


def test_drift_below_from_the_first_eval_point_is_that_eval_point():
    drift = np.concatenate([NO_HALF, np.full(25, 0.01)])
    assert float(converge(DRIFT, GRID, drift[None, None, :]).steps[0, 0]) == pytest.approx(GRID[4])


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.floats(0.125, 10.0, width=32), min_size=12, max_size=12),
    st.floats(0.5, 4.0),
    st.floats(-2.0, 2.0),
)
def test_loss_fraction_ignores_shift_and_scale_of_the_loss(losses, factor, shift):
    steps = np.arange(12) * 5
    losses = np.round(np.array(losses), 2)
    plain = converge(LOSS, steps, losses[None, :])
    moved = converge(LOSS, steps, (factor * losses + shift)[None, :])
    if 1 <= np.argmin(losses) < 11 and not np.any(np.isclose((losses - losses.min()) / np.ptp(losses), 0.1, atol=1e-3)):
        np.testing.assert_allclose(plain.steps, moved.steps, rtol=1e-2, atol=1e-2)
    assert 0 <= float(plain.steps[0]) <= 55 or np.isnan(plain.steps[0])


def test_a_curve_that_ends_early_is_read_to_its_end():
    losses, drifts = decay(30.0), drift_of_power(1.0)
    late = 0.5 * (STEPS > 400)  # what comes after would change the time
    for rule, steps, curve, end in ((LOSS, STEPS, losses - late, 21), (DRIFT, GRID, drifts + (GRID > 200.0), 18)):
        filled = np.concatenate([curve[:end], np.full(len(curve) - end, np.nan)])
        alone = converge(rule, steps[:end], curve[:end][None] if rule is LOSS else curve[:end][None, None])
        for among in (curve, filled):
            curves = np.stack([curve, among]) if rule is LOSS else np.stack([curve, among])[:, None]
            found = converge(rule, steps, curves, [len(curve), end])
            np.testing.assert_array_equal(found.steps[1], alone.steps[0])
            np.testing.assert_array_equal(found.censored[1], alone.censored[0])
        whole = converge(rule, steps, curve[None] if rule is LOSS else curve[None, None])
        np.testing.assert_array_equal(found.steps[0], whole.steps[0])
        assert not np.any(alone.censored)
        assert np.all(np.asarray(alone.steps) != np.asarray(whole.steps))


def test_a_curve_cut_short_of_its_convergence_is_censored_at_its_end():
    found = converge(DRIFT, GRID, drift_of_power(1.0)[None, None], [14])
    assert (float(found.steps[0, 0]), bool(found.censored[0, 0])) == (pytest.approx(GRID[13]), True)
    found = converge(LOSS, STEPS, decay(300.0)[None], [11])
    assert (float(found.steps[0]), bool(found.censored[0])) == (200.0, True)


@pytest.mark.parametrize("num_points", [[1], [52], [5, 5]])
def test_a_number_of_looks_that_no_curve_has_is_refused(num_points):
    with pytest.raises(ValueError, match=r"num_points must be \[1\] numbers from 2 to 51; got \[\d"):
        converge(LOSS, STEPS, decay(30.0)[None, :], num_points)


def test_rules_can_be_jitted_and_returned_as_a_pytree():
    found = jax.jit(lambda losses: converge(LOSS, STEPS, losses))(decay(30.0)[None, :])
    assert len(jax.tree.leaves(found)) == 2


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("slope", 0.1, 3), "convergence rule is 'slope'; allowed: loss_fraction, splice, drift"),
        (("drift", 0.0, 3), "epsilon is 0.0; allowed: between 0 and 1"),
        (("drift", 1.5, 3), "epsilon is 1.5"),
        (("drift", 0.1, 0), "sustain is 0; allowed: 1 or more"),
    ],
)
def test_bad_rules_are_refused(arguments, text):
    with pytest.raises(ConfigError, match=text):
        ConvergenceRule(*arguments)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"curves \[K, N\] or \[K, M, N\]; got steps \(51,\) and curves \(51,\)"):
        converge(LOSS, STEPS, decay(30.0))
    with pytest.raises(ValueError, match=r"curves \[K, M, N\]"):
        converge(DRIFT, STEPS, np.ones((2, 51)))
