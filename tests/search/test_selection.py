"""Balance, prune, pick, sweep: on laws written down by hand, so every answer can be checked by arithmetic."""

import json
import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mars_jax.errors import ConfigError, DataError, NoValidResultError
from mars_jax.lanes.halving import halving_schedule, survivors
from mars_jax.laws.balance import balanced_rank, balanced_rank_continuous
from mars_jax.laws.fit import Laws
from mars_jax.laws.law_c import ConvergenceLaw
from mars_jax.laws.law_p import Overfit
from mars_jax.runtime.jsonfiles import load_json, write_json
from mars_jax.search.selection import Selection, with_convergence, without_laws
from mars_jax.search.strategies.best_probes import best_probed, decided_by_final_runs
from mars_jax.search.strategies.laws import pick_by_laws
from mars_jax.search.strategies.paper import pick_as_published
from tests.helpers.planted_laws import law_c, law_p, laws

GRID = (4, 8, 16, 32, 64)
GRIDS = {"vision": GRID, "llm": GRID, "projector": (8,)}
PARAMETERS = {"vision": 100, "llm": 1000, "projector": 10}


def pick(these, method="laws", samples=1024, grids=GRIDS, **options):
    pick_by = {"laws": pick_by_laws, "paper": pick_as_published}[method]
    return pick_by(these, grids, samples, PARAMETERS, **options)


# The balance solver


def test_balanced_rank_and_closed_form_agree_on_a_law_with_offsets():
    pivot, other = law_c(20.0, -0.4, 0.6, 15.0), law_c(35.0, -0.3, 0.6, 5.0)
    exact = balanced_rank_continuous(pivot, other, 16, 1024)
    assert float(other.log_steps(exact, 1024)) == pytest.approx(float(pivot.log_steps(16, 1024)), rel=1e-9)
    fine = list(range(1, 513))
    assert abs(balanced_rank(pivot, other, 16, 1024, fine) - exact) <= 0.51


def test_solver_is_real_on_ten_thousand_random_laws():
    rng = np.random.default_rng(0)
    brackets = []
    for _ in range(10_000):
        pair = []
        for _ in range(2):
            k, gamma, delta = np.exp(rng.uniform(-3, 6)), rng.uniform(-1.5, 0.5), rng.uniform(-0.5, 1.5)
            offset = rng.choice([0.0, np.exp(rng.uniform(-2, 12))])
            pair.append(ConvergenceLaw(k, gamma, delta, float(offset), {}, 3, 0.0, 0, np.zeros((0, 4))))
        rank, samples = int(rng.choice(GRID)), float(np.exp(rng.uniform(3, 14)))
        assert balanced_rank(*pair, rank, samples, GRID) in GRID
        exact = balanced_rank_continuous(*pair, rank, samples)
        brackets.append(exact is None)
        assert exact is None or (isinstance(exact, float) and math.isfinite(exact) and exact > 0)
    assert 0.05 < np.mean(brackets) < 0.95  # both cases were met


def test_no_rank_is_fast_enough():
    fast, slow = law_c(1.0, -0.4, 0.1), law_c(1.0, -0.4, 0.1, 1e4)
    assert balanced_rank_continuous(fast, slow, 16, 1024) is None
    assert balanced_rank(fast, slow, 16, 1024, GRID) == 64
    assert balanced_rank_continuous(fast, law_c(1.0, 0.0, 0.1), 16, 1024) is None


@given(
    st.sampled_from(GRID),
    st.floats(-1.0, -0.1),
    st.floats(0.1, 1.0),
    st.floats(1.0, 100.0),
    st.integers(10, 10**6),
)
def test_equal_laws_balance_at_equal_ranks(rank, gamma, delta, k, samples):
    law = ConvergenceLaw(k, gamma, delta, 0.0, {}, 3, 0.0, 0, np.zeros((0, 4)))
    assert balanced_rank(law, law, rank, samples, GRID) == rank
    assert balanced_rank_continuous(law, law, rank, samples) == pytest.approx(rank, rel=1e-6)


# The pick


def test_equal_laws_keep_the_diagonal_and_pick_its_largest_ranks():
    found = pick(laws())
    kept = [c.ranks for c in found.candidates if c.kept]
    assert kept == [{"vision": r, "llm": r, "projector": 8} for r in GRID]
    assert found.pick == {"vision": 64, "llm": 64, "projector": 8}
    assert found.tau == pytest.approx(math.log(1.25))
    assert found.p_best == 1.0
    assert found.fallback is None
    assert len(found.candidates) == 25
    assert "vision 64, llm 64, projector 8" in found.explanation
    assert "5 rank vectors kept from 25" in found.explanation


def test_numbers_of_a_candidate():
    found = pick(laws())
    one = next(c for c in found.candidates if c.ranks == {"vision": 4, "llm": 16, "projector": 8})
    time = {m: 20.0 * r**-0.4 * 1024**0.6 for m, r in (("vision", 4), ("llm", 16))}
    assert one.convergence_steps == pytest.approx(time)
    assert one.imbalance == pytest.approx(0.4 * math.log(4))
    assert one.predicted_loss == pytest.approx(10 / (4**0.1 * 16**0.2 * 1024**0.3) + 0.8)
    assert one.parameters == 400 + 16_000 + 80
    assert not one.kept
    assert one.reason == "modules converge a factor 1.74 apart; more than 1.25"
    sizes = [c.parameters for c in found.candidates]
    assert sizes == sorted(sizes)


def test_tau_grows_with_the_bootstrap_spread():
    found = pick(laws(vision=law_c(20.0, -0.4, 0.6, spread=0.5), llm=law_c(20.0, -0.4, 0.6, spread=0.0)))
    assert found.tau == pytest.approx(1.64 * 0.5, rel=0.2)
    assert sum(c.kept for c in found.candidates) > 5


def test_over_fitting_law_picks_inside_the_grid_where_the_paper_cannot():
    turning = law_p({"vision": 0.1, "llm": 0.2}, overfit=Overfit(1e-5, {"vision": 0.5, "llm": 1.0}, 0.7))
    both = laws(performance=turning)
    assert pick(both, samples=4096).pick["llm"] < 64
    assert pick(both, "paper", samples=4096).pick["llm"] == 64


def test_paper_method_keeps_one_vector_for_each_llm_rank():
    found = pick(laws(vision=law_c(30.0, -0.4, 0.6)), "paper")
    kept = [c.ranks for c in found.candidates if c.kept]
    assert sorted(c["llm"] for c in kept) == list(GRID)
    assert {c["llm"]: c["vision"] for c in kept}[16] == balanced_rank(
        law_c(20.0, -0.4, 0.6), law_c(30.0, -0.4, 0.6), 16, 1024, GRID
    )
    assert found.method == "paper"


def test_no_balanced_pair_falls_back_to_the_least_unbalanced_and_says_so():
    found = pick(laws(vision=law_c(1000.0, -0.4, 0.6), llm=law_c(1.0, -0.4, 0.6)))
    assert found.pick == {"vision": 64, "llm": 4, "projector": 8}
    assert [c.ranks for c in found.candidates if c.kept] == [found.pick]
    factor = 1000 * (64 / 4) ** -0.4
    assert f"even at vision 64, llm 4, projector 8 the modules converge a factor {factor:.2f} apart" in found.fallback
    assert "Widen the rank grid" in found.fallback
    assert found.explanation == found.fallback


def test_three_searched_modules():
    three = laws(performance=law_p({"vision": 0.1, "llm": 0.2, "projector": 0.05}))
    three = Laws(
        {**three.convergence, "projector": law_c(20.0, -0.4, 0.6)}, {}, three.performance, three.performance, 0
    )
    found = pick(three, grids={"vision": GRID, "llm": GRID, "projector": GRID})
    assert len(found.candidates) == 125
    assert [set(c.ranks.values()) for c in found.candidates if c.kept] == [{r} for r in GRID]
    assert sum(c.kept for c in pick(three, "paper", grids=dict.fromkeys(three.convergence, GRID)).candidates) == 5


def test_ties_go_to_fewer_parameters():
    flat = laws(performance=law_p({"vision": 0.0, "llm": 0.0}))
    assert pick(flat).pick == {"vision": 4, "llm": 4, "projector": 8}


def test_a_gain_below_half_a_percent_does_not_pay_for_more_parameters():
    # From vision's rank 4 to 64 the falling part changes by a factor (64 / 4) ** 0.0005, or 0.14 %.
    flat = laws(
        performance=law_p({"vision": 0.0005, "llm": 0.2}), vision=law_c(20.0, 0.0, 0.6), llm=law_c(20.0, 0.0, 0.6)
    )
    found = pick(flat)
    assert found.pick == {"vision": 4, "llm": 64, "projector": 8}
    assert found.p_best == 1.0
    assert pick(flat, method="paper").pick["llm"] == 64
    steep = laws(
        performance=law_p({"vision": 0.05, "llm": 0.2}), vision=law_c(20.0, 0.0, 0.6), llm=law_c(20.0, 0.0, 0.6)
    )
    assert pick(steep).pick["vision"] == 64


def test_json_has_the_documented_keys_and_comes_back(tmp_path):
    found = pick(laws())
    document = json.loads(json.dumps(found.to_json(), allow_nan=False))
    keys = {"target_num_samples", "pick", "factors", "p_best", "fallback", "method", "candidates", "tau"}
    assert set(document) == keys | {"explanation", "seed", "step_law", "convergence_steps"}
    candidate_keys = {"ranks", "convergence_steps", "imbalance", "kept", "reason", "predicted_loss", "predicted_ci"}
    assert set(document["candidates"][0]) == candidate_keys | {"parameters", "p_best", "probed_loss"}
    write_json(tmp_path / "selection.json", found.to_json())
    assert load_json(tmp_path / "selection.json", Selection) == found


def test_a_candidate_without_its_interval_ended_in_a_traceback(tmp_path):
    file = tmp_path / "selection.json"
    document = pick(laws()).to_json()
    del document["candidates"][3]["predicted_ci"]
    write_json(file, document)
    with pytest.raises(DataError) as error:
        load_json(file, Selection)
    assert str(error.value) == (
        f"{file}: candidates.3.predicted_ci is missing. Delete it, and run the command that writes it again."
    )


# The sweep


PROBED = [
    ({"vision": 8, "llm": 64, "projector": 8}, 1.3),
    ({"vision": 8, "llm": 64, "projector": 8}, 1.1),
    ({"vision": 64, "llm": 8, "projector": 8}, 1.1),
    ({"vision": 16, "llm": 16, "projector": 8}, 1.5),
]


@pytest.fixture
def probed():
    return pick(laws(), probed=PROBED)


def test_the_sweep_takes_the_best_probes_with_their_seeds_averaged(probed):
    assert [candidate.probed_loss for candidate in probed.candidates].count(None) == 22
    second, first, third = PROBED[0][0], PROBED[2][0], PROBED[3][0]
    assert best_probed(probed, 8) == (first, second, third)
    assert best_probed(probed, 2) == (first, second)
    assert best_probed(pick(laws()), 8) == ()


def test_the_sweep_decides_by_the_losses_of_the_final_runs(probed):
    first, second = best_probed(probed, 2)
    decided = decided_by_final_runs(probed, [(first, 1.1), (second, 1.05)])
    assert decided.pick == second
    assert decided.method == "local_sweep"
    assert "where the laws had picked vision 64, llm 64, projector 8" in decided.explanation
    assert "vision 8, llm 64, projector 8: 1.0500; vision 64, llm 8, projector 8: 1.1000" in decided.explanation
    agreed = decided_by_final_runs(probed, [(probed.pick, 1.0), (second, float("nan"))])
    assert agreed.pick == probed.pick
    assert "which the laws had picked as well" in agreed.explanation
    assert agreed.candidates == probed.candidates


def test_sweep_without_a_finite_loss_is_refused(probed):
    with pytest.raises(NoValidResultError, match="no loss is finite"):
        decided_by_final_runs(probed, [(probed.pick, float("inf"))])


def test_sweep_of_an_unknown_vector_is_refused(probed):
    with pytest.raises(ConfigError, match="vision 3, llm 3, which is not in the rank grid"):
        decided_by_final_runs(probed, [({"vision": 3, "llm": 3}, 1.0)])


def test_halving_schedule():
    assert [tuple(rung) for rung in halving_schedule(5, 400)] == [(5, 100, 3), (3, 200, 2), (2, 400, 1)]
    assert [tuple(rung) for rung in halving_schedule(1, 400)] == [(1, 400, 1)]
    with pytest.raises(ConfigError, match="0 lanes and 10 steps"):
        halving_schedule(0, 10)


@given(st.integers(1, 40), st.integers(1, 10_000))
def test_halving_schedule_ends_with_one_lane_at_all_steps(lanes, steps):
    rungs = halving_schedule(lanes, steps)
    assert (rungs[0].lanes, rungs[-1].survivors, rungs[-1].steps) == (lanes, 1, steps)
    assert all(a.survivors == b.lanes and a.steps <= b.steps for a, b in pairwise(rungs))


@given(st.lists(st.floats(), max_size=8), st.integers(1, 5))
def test_survivors_are_the_smallest_finite_losses(losses, keep):
    alive = survivors(losses, keep)
    finite = sorted(loss for loss in losses if math.isfinite(loss))
    assert [losses[i] for i in alive] == finite[:keep]


# What is refused


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"samples": 0}, "target number of samples is 0"),
        ({"grids": {**GRIDS, "llm": ()}}, r"rank grid of module 'llm' is \[\]"),
        (
            {"grids": {**GRIDS, "llm": (0, 8)}},
            r"rank grid of module 'llm' is \[0, 8\]; allowed: one or more ranks >= 1",
        ),
        ({"grids": {**GRIDS, "audio": (8,)}}, "parameters_per_rank has no module 'audio'"),
        ({"grids": {"vision": (8,), "llm": (8,)}}, "nothing to select"),
        ({"grids": {**GRIDS, "projector": (8, 16)}}, "grid searches vision, llm, projector .* laws are of vision, llm"),
        ({"grids": {"llm": GRID}}, "names llm, but the laws are of vision, llm"),
    ],
)
def test_what_does_not_belong_together_is_refused(options, text):
    with pytest.raises(ConfigError, match=text):
        pick(laws(), **options)


def test_convergence_beside_a_pick_says_which_module_lags():
    picked = without_laws("laws+race", {"vision": 4, "projector": 8, "llm": 64}, 1024, "It ended lowest.")
    shown = with_convergence(picked, laws())
    assert set(shown.convergence_steps) == set(laws().convergence)
    slowest, fastest = (f(shown.convergence_steps, key=shown.convergence_steps.get) for f in (max, min))
    lag = shown.convergence_steps[slowest] / shown.convergence_steps[fastest]
    assert lag > 1.25
    assert shown.explanation.startswith("It ended lowest. By Law-C, at these ranks and the usual learning rates, ")
    assert shown.explanation.endswith(f" to converge: {slowest} lags by a factor {lag:.1f}.")
    same = replace(picked, pick={**picked.pick, "vision": 64})
    together = with_convergence(
        same, replace(laws(), convergence=dict.fromkeys(("vision", "llm"), law_c(20.0, -0.4, 0.6)))
    )
    assert together.explanation.endswith(" to converge: they converge together.")
    frozen = with_convergence(replace(picked, pick={"projector": 8, "llm": 64}), laws())
    assert list(frozen.convergence_steps) == ["llm"]
    untimed = with_convergence(picked, replace(laws(), convergence={}, untimed={"vision": "Too few times."}))
    assert (untimed.convergence_steps, untimed.explanation) == ({}, "It ended lowest. Too few times.")
