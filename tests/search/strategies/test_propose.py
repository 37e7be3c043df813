"""Proposals of Law-P in step sizes, on a planted surface with its optimum inside ranks and rates."""

import dataclasses
import math

import numpy as np
import pytest

from mars_jax.lanes.eval_points import EvalPoint
from mars_jax.search.recorded_trainer import RecordedTrainer
from mars_jax.search.strategies.base import Budget
from mars_jax.search.strategies.laws_race import PROPOSED
from mars_jax.search.strategies.propose import proposals, step_law
from mars_jax.search.strategies.registry import STRATEGIES
from mars_jax.search.strategies.spread import spread_configurations
from mars_jax.search.trainer import Curve
from tests.search.strategies.test_registry import SPACE as RANKS_ALONE

STEPS = 64
SPACE = dataclasses.replace(RANKS_ALONE, factors={"vision": (1 / 3, 1.0, 3.0), "llm": (1 / 3, 1.0, 3.0)})
SAMPLES = np.random.default_rng(0).exponential(1.0, 200)


def end(configuration, seed=0):
    """Log loss is a bowl in octaves of step size, lowest at 24 of vision and 8 of the LLM, and 1 % noise."""
    octaves = [
        math.log2(configuration.ranks[module] * configuration.factors.get(module, 1.0) / best)
        for module, best in (("vision", 24.0), ("llm", 8.0))
    ]
    name = np.frombuffer(configuration.name.encode(), np.uint8)
    return 0.5 * math.exp(0.02 * sum(x * x for x in octaves) + 0.01 * np.random.default_rng([seed, *name]).normal())


def curve(configuration, seed=0, diverged=False):
    points = []
    for step in range(0, STEPS + 1, 4):
        loss = end(configuration, seed) * (STEPS / max(step, 1)) ** 0.3
        samples = SAMPLES / SAMPLES.mean() * loss
        alive = not (diverged and step)
        points.append(
            EvalPoint(step, loss if alive else np.inf, alive=alive, sample_losses=tuple(samples.tolist()),
                      reason=None if alive else "the validation loss was not finite")
        )  # fmt: skip
        if not alive:
            break
    return Curve(configuration, tuple(points))


@pytest.mark.parametrize("seed", range(5))
def test_proposals_are_new_and_better_than_what_was_begun(seed):
    begun = [curve(one, seed) for one in spread_configurations(SPACE, 5)]
    proposed = proposals(begun, SPACE, 3)
    assert len({one.name for one in proposed} | {one.configuration.name for one in begun}) == 8
    assert np.mean([end(one, seed) for one in proposed]) < np.mean([one.loss for one in begun])


def test_the_optimum_of_the_law_is_near_the_planted_one():
    law = step_law([curve(one) for one in spread_configurations(SPACE, 24)], SPACE)
    for module, best in (("vision", 24e-3), ("llm", 8e-3)):
        assert abs(math.log2(law.optimum(module) / best)) < 1.5


def test_runs_with_a_frozen_module_or_that_diverged_say_nothing_of_the_law():
    frozen = dataclasses.replace(SPACE, grids=SPACE.grids | {"vision": (0, 2, 8, 32)})
    trained = [curve(one) for one in spread_configurations(SPACE, 4)]
    others = [
        Curve(frozen.configuration({"vision": 0, "llm": 8}), trained[0].points),
        curve(SPACE.configuration({"vision": 32, "llm": 32}, {"vision": 3.0}), diverged=True),
    ]
    without = proposals(trained, frozen, 3)
    assert proposals([*trained, *others], frozen, 3) == without
    assert all(one.ranks["vision"] for one in without)
    assert proposals([*trained[:2], *others], frozen, 3) == []
    assert step_law(others, frozen) is None


def searched(strategy, seed):
    trainer = RecordedTrainer(curve(one, seed) for one in SPACE.every())
    return STRATEGIES[strategy].search(SPACE, trainer, Budget(4)).final.loss, trainer.trained


def test_the_law_finds_better_runs_than_the_race_that_it_begins_with():
    gains = []
    for seed in range(5):
        (loss, trained), (raced, alone) = searched("laws+race", seed), searched("race", seed)
        assert trained[: len(alone)] == alone
        assert len(trained) == len(alone) + PROPOSED
        assert sum(one.steps for one in trained) < 5 * STEPS
        gains.append(raced / loss - 1.0)
    assert min(gains) > -0.01  # where the proposals are equal to the leader within noise, the smallest may be picked
    assert np.mean(gains) > 0.01
