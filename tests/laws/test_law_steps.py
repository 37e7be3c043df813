"""Law-P in step sizes: planted surfaces come back, and an optimum inside ranks and rates is found."""

import itertools

import numpy as np
import pytest

from mars_jax.errors import NoValidResultError
from mars_jax.laws.law_steps import StepLaw, fit_step_law

PLANTED = StepLaw(
    c=-1.0, A={"vision": 0.05, "llm": 0.3}, C={"vision": 0.08, "llm": 0.02}, unit={"vision": 8e-3, "llm": 8e-3}
)
GRID = list(itertools.product((2, 8, 32), (2, 8, 32), (1e-3, 3e-3), (1e-3, 3e-3)))
RANKS = {"vision": [g[0] for g in GRID], "llm": [g[1] for g in GRID]}
RATES = {"vision": [g[2] for g in GRID], "llm": [g[3] for g in GRID]}


def test_a_planted_law_comes_back_in_other_units():
    law = fit_step_law(RANKS, RATES, PLANTED.log_loss(RANKS, RATES))
    np.testing.assert_allclose(law.log_loss(RANKS, RATES), PLANTED.log_loss(RANKS, RATES), atol=1e-9)
    for module in RANKS:
        assert law.optimum(module) == pytest.approx(PLANTED.optimum(module), rel=1e-6)


def test_the_planted_optimum_is_lower_than_its_neighbours_in_rank_and_in_rate():
    best = PLANTED.optimum("llm")
    assert best is not None
    around = {"vision": [8, 8, 8], "llm": [16, 16, 16]}
    rates = {"vision": [1e-3] * 3, "llm": [best / 16 / 1.3, best / 16, best / 16 * 1.3]}
    low, middle, high = PLANTED.log_loss(around, rates)
    assert middle < min(low, high)


@pytest.mark.parametrize("seed", range(5))
def test_noise_of_two_percent_moves_the_optimum_by_less_than_an_octave(seed):
    noisy = PLANTED.log_loss(RANKS, RATES) + 0.02 * np.random.default_rng(seed).normal(size=len(GRID))
    law = fit_step_law(RANKS, RATES, noisy)
    for module in RANKS:
        assert abs(np.log2(law.optimum(module) / PLANTED.optimum(module))) < 1.0


def test_losses_that_only_fall_with_the_step_size_have_no_optimum():
    step = np.multiply(RANKS["llm"], RATES["llm"])
    law = fit_step_law({"llm": RANKS["llm"]}, {"llm": RATES["llm"]}, 0.1 * step**-0.5)
    assert law.optimum("llm") is None
    assert law.C["llm"] == pytest.approx(0.0, abs=1e-9)


def test_two_runs_determine_no_law():
    with pytest.raises(NoValidResultError, match=r"2 runs; needed: 3 or more"):
        fit_step_law({"llm": [2, 8]}, {"llm": [1e-3, 1e-3]}, [0.1, 0.2])
