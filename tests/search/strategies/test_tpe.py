"""TPE with successive halving, on curves that are known."""

import math
from importlib.util import find_spec

import numpy as np
import pytest

from mars_jax.errors import ConfigError
from mars_jax.lanes.eval_points import EvalPoint
from mars_jax.lanes.stopping import replay
from mars_jax.search.strategies import model_search
from mars_jax.search.strategies.base import Budget, Space
from mars_jax.search.strategies.gp import GP
from mars_jax.search.strategies.tpe import TPE
from mars_jax.search.trainer import Curve


class Trainer:
    """Gives each configuration its curve, as far as the stopping rule lets it run."""

    def __init__(self, curve):
        self._curve = curve

    def train(self, configurations, stopping):
        seen = replay([self._curve(configuration.ranks) for configuration in configurations], stopping)
        return [Curve(c, tuple(points)) for c, points in zip(configurations, seen, strict=True)]


def suggested(grids, steps, runs, seed, curve):
    """The runs that TPE asks for."""
    space = Space(
        grids, 64, steps, probed=(), sizes=(), parameters_per_rank={}, rates={}, fit=lambda records: None,
        most_together=1, seed=seed,
    )  # fmt: skip
    return list(TPE.search(space, Trainer(curve), Budget(runs)).curves)


GRIDS = {"vision": [2, 4, 8, 16, 32], "llm": [2, 4, 8, 16, 32]}


def test_tpe_asks_once_for_each_pair_and_finds_a_minimum_that_chance_rarely_does():
    def loss(ranks):
        return (np.log2(ranks["vision"]) - 2) ** 2 + (np.log2(ranks["llm"]) - 4) ** 2

    asked = []

    def curve(ranks):
        asked.append(ranks)
        return [EvalPoint(step, loss(ranks) + 16 / (1 + step)) for step in range(0, 17, 2)]

    best, stopped = [], 0
    for seed in range(5):
        asked.clear()
        runs = suggested(GRIDS, 16, 12, seed, curve)
        assert [run.configuration.ranks for run in runs] == asked
        assert len({tuple(ranks.values()) for ranks in asked}) == len(asked)
        # The last one may exceed the budget.
        assert sum(run.steps for run in runs[:-1]) < 12 * 16
        assert {run.steps for run in runs} <= {4, 8, 16}  # rungs
        best.append(min(loss(run.configuration.ranks) for run in runs))
        stopped += sum(run.steps < 16 for run in runs)
        # None of the best was stopped. (Optuna counts what it suggests again among the half that goes on.)
        for place, run in enumerate(runs):
            if run.steps < 16:
                there = [loss(other.configuration.ranks) for other in runs[:place] if other.steps >= run.steps]
                assert sum(other <= loss(run.configuration.ranks) for other in there) >= len(there) / 4
        assert [(run.configuration, run.points) for run in suggested(GRIDS, 16, 12, seed, curve)] == [
            (run.configuration, run.points) for run in runs
        ]
    assert stopped > 10
    assert np.mean(best) <= 1.0  # the mean over pairs is 4


def test_tpe_goes_on_after_runs_that_diverged():
    def curve(ranks):
        if ranks["llm"] > 4:
            return [EvalPoint(0, 2.0), EvalPoint(4, math.nan, alive=False, reason="the validation loss was not finite")]
        return [EvalPoint(0, 2.0), EvalPoint(16, 1.0)]

    runs = suggested(GRIDS, 16, 6, 0, curve)
    assert sum(run.steps == 16 for run in runs) >= 4
    assert any(run.steps == 4 for run in runs)


def test_tpe_ends_when_all_pairs_were_run():
    runs = suggested({"llm": [2, 8]}, 4, 25, 0, lambda ranks: [EvalPoint(0, 2.0), EvalPoint(4, 1.0 / ranks["llm"])])
    assert sorted(run.configuration.ranks["llm"] for run in runs) == [2, 8]


def test_a_sampler_knows_that_ranks_are_ordered():
    """Told that the loss falls with the rank up to the last but one, it asks for the largest before the smallest."""
    ranks = [2**k for k in range(10)]

    def curve(asked):
        return [EvalPoint(0, 9.0), EvalPoint(4, 1.0 + abs(math.log2(asked["llm"]) - 8))]

    space = Space(
        {"llm": ranks}, 64, 4, probed=(), sizes=(), parameters_per_rank={}, rates={}, fit=lambda records: None,
        most_together=1, seed=1,
    )  # fmt: skip
    asked = [run.configuration.ranks["llm"] for run in GP.search(space, Trainer(curve), Budget(7)).curves]
    assert 256 in asked[4:]  # after four at random
    assert np.mean(np.log2(asked[4:])) > 6


def test_a_package_that_is_missing_is_named_with_its_extras(monkeypatch):
    monkeypatch.setattr(model_search, "find_spec", lambda package: None if package == "torch" else find_spec(package))
    with pytest.raises(ConfigError) as error:
        suggested_by(GP)
    assert str(error.value) == "selection.method: gp needs torch. Run `pip install 'mars_jax[compare,torch]'`."


def suggested_by(strategy):
    space = Space({"llm": [2, 8]}, 64, 4, (), (), {}, {}, fit=lambda records: None, most_together=1)
    return strategy.search(space, Trainer(lambda ranks: [EvalPoint(0, 2.0), EvalPoint(4, 1.0)]), Budget(2))
