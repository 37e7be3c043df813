"""Verdicts, regrets and prices of the evidence benchmarks, on made-up numbers."""

import itertools
import math
import statistics
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks.evidence import claims as evidence_claims
from benchmarks.evidence import methods as evidence_methods
from benchmarks.evidence import page as evidence_page
from benchmarks.evidence import planted
from benchmarks.evidence import run as evidence_run
from benchmarks.evidence import tables as evidence_tables
from benchmarks.evidence.replay import Grid, Replay
from benchmarks.evidence.runs import Run
from mars_jax.search.strategies.base import Budget, Space
from mars_jax.search.strategies.halving import HALVING
from mars_jax.search.strategies.separate_rates import SEPARATE_RATES
from mars_jax.search.strategies.tpe import TPE
from mars_jax.search.strategies.uniform import Uniform

# Planted truth.


def trial(condition, vision, llm, seed=0, rule="drift", cost=1.0):
    def time(steps):
        return None if steps is None else {"steps": abs(steps), "censored": steps < 0}  # censored: below zero

    times = {"vision": time(vision), "llm": time(llm)}
    return {"condition": condition, "seed": seed, "rule": rule, "times": times, "cost": cost}


def test_a_rule_is_right_where_the_slowed_module_takes_longer_than_in_the_balanced_lane():
    trials = [
        trial("balanced", 40.0, 20.0),
        trial("vision rate / 10", 400.0, 20.0),  # tenfold, the other as before
        trial("vision rate / 3", 60.0, 60.0),  # the wrong way: both took longer, the other more
        trial("llm rate / 3", 40.0, 60.0),
        trial("llm rate / 10", None, 60.0),
        trial("vision rank 2", 1.0, 900.0),  # no verdict
        trial("balanced", 1.0, 1.0, rule="splice"),
    ]
    found = planted.judge("drift", trials)
    assert (found["lanes"], found["not told"], found["order"]) == (4, 1, 0.5)
    assert found["factor at rate / 10"] == 10.0
    assert found["factor at rate / 3"] == statistics.median([0.5, 3.0])
    assert found["other"] == statistics.median([1.0, 3.0, 1.0])


def test_two_censored_times_show_nothing_but_one_does():
    trials = [
        trial("balanced", 40.0, 20.0),
        trial("vision rate / 3", -384.0, -384.0),
        trial("vision rate / 10", -384.0, 20.0),
    ]
    found = planted.judge("drift", trials)
    assert (found["lanes"], found["not told"], found["order"]) == (2, 1, 0.5)


def test_exponents_of_ranks_are_found_again():
    def steps(ranks, seed):
        return (1.0 + seed) * 100.0 * ranks["vision"] ** -0.3 * ranks["llm"] ** 0.1

    rows = [
        {
            "alpha": "rsLoRA",
            "seed": seed,
            "rule": "drift",
            "ranks": ranks,
            "times": {"vision": {"steps": steps(ranks, seed), "censored": False}},
        }
        for seed in (0, 1)
        for vision, llm in [(2, 8), (8, 8), (32, 8), (8, 2), (8, 32)]
        for ranks in [{"vision": vision, "llm": llm}]
    ]
    rows.append({**rows[0], "times": {"vision": {"steps": 9999.0, "censored": True}}})
    (found,) = [
        row
        for row in planted.exponents(rows)
        if (row["alpha rule"], row["rule"], row["module"]) == ("rsLoRA", "drift", "vision")
    ]
    assert found["points"] == 10
    assert (found["gamma"], found["cross"]) == (pytest.approx(-0.3), pytest.approx(0.1))


# Evidence.


def run(vision, llm, loss, test_loss=1.0, curve=()):
    return Run({"vision": vision, "projector": 8, "llm": llm}, [*curve, (64, loss)], test_loss)


RUNS = [
    run(2, 2, 1.2, 1.5, [(16, 1.3), (32, 1.25)]),
    run(2, 8, 1.0, 1.1, [(16, 1.6), (32, 1.1)]),
    run(8, 2, 1.5, 1.0, [(16, 1.5), (32, 1.5)]),
    run(8, 8, 1.1, 1.2, [(16, 1.4), (32, 1.3)]),
]
EVEN = SimpleNamespace(final=lambda ranks, share=1.0: share)
SPACE = Space(
    grids={"vision": (2, 8), "projector": (8,), "llm": (2, 8)},
    num_samples=1024,
    steps=64,
    probed=[run.ranks for run in RUNS],
    sizes=(),
    parameters_per_rank={},
    rates={},
    fit=lambda records: pytest.fail("no probes, so no laws"),
    most_together=4,
)


def replay(rated=()):
    return Replay(Grid(RUNS, rated), SPACE, EVEN)


def test_regret_is_relative_to_the_best_of_the_grid():
    found = Grid(RUNS).regret(RUNS[3])
    assert found == {"regret": pytest.approx(0.1), "test_regret": pytest.approx(0.2)}


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_random_search_is_the_mean_over_all_draws(number):
    grid = Grid(RUNS)
    draws = [min(draw, key=lambda run: run.loss) for draw in itertools.combinations(RUNS, number)]
    expected = {name: statistics.mean(grid.regret(run)[name] for run in draws) for name in ("regret", "test_regret")}
    assert evidence_methods._best_of_random(RUNS, grid, number) == pytest.approx(expected)


def test_the_sweep_halves_on_the_recorded_curves_and_pays_for_what_it_reads():
    found = replay().swept("all", [run.ranks for run in RUNS])
    ranks, cost = found.ranks, found.compute - EVEN.final(found.ranks)
    # After 32 of 64 steps (2, 2) and (2, 8) lead, and (2, 8) ends best; at 16 steps it was last.
    assert (ranks["vision"], ranks["llm"]) == (2, 8)
    # Four half runs and two other halves, less the winner's whole run, which is the final run.
    assert cost == pytest.approx(4 * 0.5 + 2 * 0.5 - 1.0)


def test_a_sweep_of_one_costs_nothing():
    found = replay().swept("one", [RUNS[1].ranks])
    assert (found.ranks, found.compute - EVEN.final(found.ranks)) == (RUNS[1].ranks, 0.0)


def test_the_strategies_of_the_package_are_replayed_on_the_recorded_runs_and_pay_for_what_they_train():
    halving = replay().method("halving", HALVING)
    assert (halving.ranks, halving.regret, halving.compute) == (RUNS[1].ranks, 0.0, 3.0)
    uniform = replay().method("uniform", Uniform(2))
    assert (uniform.ranks, uniform.regret, uniform.compute) == (RUNS[0].ranks, pytest.approx(0.2), 1.0)


def test_separate_rates_are_found_among_the_runs_at_other_rates():
    changed = [(module, factor) for module in ("vision", "llm") for factor in (1 / 3, 3.0)]
    losses = dict(zip(changed, (1.3, 0.9, 1.2, 1.4), strict=True))
    rated = [
        ({"vision": 1.0, "projector": 1.0, "llm": 1.0, module: factor}, run(8, 8, losses[module, factor], 1.3))
        for module, factor in changed
    ]
    found = replay(rated).method("rates", SEPARATE_RATES)
    assert (found.regret, found.test_regret) == (pytest.approx(-0.1), pytest.approx(0.3))
    assert found.compute == 5.0


def test_tpe_spends_no_more_than_its_budget_and_a_run():
    found = replay().method("tpe", TPE, Budget(2))
    assert 1.0 <= found.compute < 3.0
    assert found.regret >= 0.0


def test_share_of_cells_counts_one_without_the_method_against_it():
    cells = [{"methods": [{"name": "a", "regret": regret}]} for regret in (0.0, 0.004, 0.006)] + [{"methods": []}]
    assert evidence_tables.share_within(cells, "a") == 0.5


def test_expected_regret_is_of_means_over_the_seeds_of_a_task():
    def cell(task, losses, pick):
        grid = [{"ranks": {"vision": 2, "llm": rank}, "loss": loss} for rank, loss in losses.items()]
        return {"task": task, "grid": grid, "methods": [{"name": "a", "ranks": pick and {"vision": 2, "llm": pick}}]}

    # Means 1.0 and 1.1: the picks of the first task have regrets of 0 and 0.1, of the second 0 and 0.
    cells = [
        cell("eye", {2: 1.1, 8: 1.0}, 2),
        cell("eye", {2: 0.9, 8: 1.2}, 8),
        cell("tongue", {2: 3.0, 8: 3.1}, 2),
        cell("tongue", {2: 3.0, 8: 3.1}, 2),
    ]
    assert evidence_tables.expected_regrets("a", cells) == pytest.approx([0.0, 0.1, 0.0, 0.0])
    assert evidence_tables.expected_regrets("a", cells[1:]) == [0.0, 0.0]  # one seed of a task is no mean
    no_pick = cell("tongue", {2: 3.0, 8: 3.1}, None)
    assert evidence_tables.expected_regrets("a", [*cells[2:], no_pick]) == [0.0, 0.0]


def test_a_correlation_that_the_ranks_explain_vanishes_given_them():
    rng = np.random.default_rng(0)
    given = np.column_stack([np.ones(50), rng.normal(size=(50, 2))])
    left, right = given @ [1.0, 2.0, -1.0], given @ [0.0, 1.0, 3.0]
    noise = rng.normal(size=50)
    assert evidence_claims._correlation(left, left + 1e-3 * noise) == pytest.approx(1.0, abs=1e-3)
    assert evidence_claims._correlation(*evidence_claims._residuals(given, left, right)) is None
    both = evidence_claims._residuals(given, left + noise, right - noise)
    assert evidence_claims._correlation(*both) == pytest.approx(-1.0)
    assert math.isclose(evidence_claims._correlation(noise, noise), 1.0)


def test_the_page_shows_the_method_of_the_figure_and_counts_those_it_leaves_out():
    names = [evidence_run.DEFAULT_METHOD, "uniform rank 8", "separate: quadratic surface", "random search, 2 runs"]
    rows = [{"method": name} for name in names]
    tables = {"Methods": rows, "Mean regret by task": rows, "Grids": [{"task": "eye"}]}
    shown = evidence_page.evidence({"tables": tables})
    assert [row["method"] for row in shown.tables["Methods"]] == [names[0], names[1], names[3]]
    assert [row["method"] for row in shown.tables["Mean regret by task"]] == names[:2]
    assert shown.tables["Grids"] == tables["Grids"]
    assert "3 of 4 methods" in shown.meaning
