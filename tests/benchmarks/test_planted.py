"""Verdicts on convergence rules, on made-up times."""

import statistics

import pytest

from benchmarks.evidence import planted


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
