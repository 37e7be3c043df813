"""Lanes that leave: why and when they do, and that no other lane's bits tell that they were ever there."""

import itertools
import math

import numpy as np
import pytest

from mars_jax.lanes.eval_points import EvalPoint
from mars_jax.lanes.halving import halving_schedule
from mars_jax.lanes.lane import Lane
from mars_jax.lanes.schedule import eval_steps
from mars_jax.lanes.stopping import AskEach, Halving, Patience, divergence, loss_ceiling, replay
from mars_jax.laws.convergence.base import ConvergenceRule
from mars_jax.runtime.checkpoint import Checkpoints
from mars_jax.search.probes.records import lane_records
from tests.helpers import least_model, tiny_lanes
from tests.helpers.tiny_lanes import LANES, RATES, assert_same, assert_same_points, schedule

# Only lanes that adapt the vision module diverge at this rate, which distinguishes them within one group.
WILD = RATES | {"vision": 1e30}
DIVERGING = LANES[0]
STEADY = [Lane({"vision": 0, "projector": p, "llm": n}, 8, 1) for p, n in ((2, 4), (1, 1), (0, 3))]
TIMING = schedule([0, 4, 6, 8, 11, 16], per_doubling=2)
# At this rate the lanes over-fit, each from its own step on.
FAST = dict.fromkeys(RATES, 3e-2)
PATIENT = schedule(eval_steps(96, 4), stopping=Patience(1.5))


def run(lanes, timing=TIMING, rates=WILD, **changes):
    return tiny_lanes.run(lanes, tiny_lanes.padded_engine(), timing, rates=rates, **changes)


def points_of(*losses):
    """Eval points of a lane, one every 10 steps."""
    return [EvalPoint(10 * i, loss) for i, loss in enumerate(losses)]


# Why and when.


def test_a_lane_stops_at_its_first_eval_point_that_is_patience_times_its_best_step():
    rule = Patience(2.0)
    points = points_of(4.0, 3.0, 2.0, 2.5, 2.4)
    assert [rule.running([points[: count + 1]]) for count in range(5)] == [[0], [0], [0], [0], []]
    assert rule.running([points, points_of(4.0, 3.0, 2.0, 2.5, 1.9)]) == [1]
    assert Patience(2.1).running([points]) == [0]
    assert Patience().running([points]) == [0]


def test_a_lane_that_has_not_improved_yet_does_not_stop():
    assert Patience(1.5).running([points_of(4.0, 5.0, 5.0, 4.5)]) == [0]
    assert Patience(1.5).running([[]]) == [0]


@pytest.mark.parametrize(
    "rule", [Patience(), Patience(2.0), AskEach(lambda step, loss: True), Halving(halving_schedule(2, 40))]
)
def test_a_lane_that_is_not_alive_stops_whatever_the_rule(rule):
    points = [*points_of(4.0, 3.0), EvalPoint(20, math.nan, alive=False)]
    assert rule.running([points, points_of(4.0, 3.0, 2.9)]) == [1]


def test_a_lane_that_is_asked_about_stops_at_the_first_no():
    rule = AskEach(lambda step, loss: loss < 3.5 or step < 10)
    assert rule.running([points_of(4.0)]) == [0]
    assert rule.running([points_of(4.0, 3.6, 1.0)]) == []


def test_a_replay_ends_where_the_rule_ends_each_lane():
    curves = [points_of(4.0, 3.0, 2.0, 2.5, 2.4, 1.0), points_of(4.0, 3.0, 2.0, 1.5, 1.4, 1.3)]
    assert [len(points) for points in replay(curves, Patience(2.0))] == [5, 6]
    assert [len(points) for points in replay(curves, Halving(halving_schedule(2, 50)))] == [6, 6]
    halved = replay([*curves, points_of(4.0, 3.9, 3.9, 3.8, 3.8, 3.8), curves[1]], Halving(halving_schedule(4, 50)))
    assert [points[-1].step for points in halved] == [50, 50, 30, 30]


def test_a_loss_diverges_above_the_ceiling_and_above_twice_its_first():
    ceiling = loss_ceiling(100)
    assert ceiling == pytest.approx(1.5 * math.log(100)) == pytest.approx(6.9078, abs=1e-4)
    assert divergence(3.0, 6.90, ceiling) is None
    assert divergence(3.0, 6.91, ceiling) == "the validation loss exploded to 6.91 nats; guessing evenly gives 4.61"
    # A base that is worse than guessing has not diverged by being itself.
    assert divergence(5.0, 9.9, ceiling) is None
    assert divergence(5.0, 10.1, ceiling) == "the validation loss exploded to 10.1 nats; guessing evenly gives 4.61"
    for loss in (math.nan, math.inf):
        assert divergence(3.0, loss, ceiling) == "the validation loss was not finite"
    assert divergence(3.0, 1e30, math.inf) is None


def test_lanes_that_ran_with_patience_have_the_rows_of_those_without_up_to_their_own_end():
    patient, whole = run(LANES, PATIENT, FAST), run(LANES, schedule(PATIENT.eval_steps), FAST)
    ends = [rows[-1].step for rows in patient.points]
    assert len(set(ends)) > 2
    assert max(ends) == 96
    for rows, all_rows in zip(patient.points, whole.points, strict=True):
        assert_same_points(rows, all_rows[: len(rows)])
        best = min(rows, key=lambda row: row.validation_loss).step
        assert (rows[-1].step < 96) == (best * 1.5 <= rows[-1].step)
        assert rows[-2].step < 1.5 * min(rows[:-1], key=lambda row: row.validation_loss).step
    # Each step has room for two lanes a block.
    active = [sum(step < end for end in ends) for step in range(96)]
    assert patient.useful_steps == sum(ends) == sum(active)
    assert patient.executed_steps == sum(2 * math.ceil(count / 2) for count in active) < whole.executed_steps == 4 * 96


def test_a_lane_that_left_with_patience_is_recorded_with_its_own_last_step():
    patient = run(LANES, schedule(PATIENT.eval_steps, per_doubling=4, stopping=Patience(1.5)), FAST)
    records = lane_records(LANES, patient.points, ConvergenceRule("drift", 0.9, 1), FAST)
    assert [record.steps for record in records] == [rows[-1].step for rows in patient.points]
    assert {record.status for record in records} <= {"converged", "horizon"}
    for record in records:
        assert all(steps <= record.steps for steps in record.convergence_steps.values())


def test_a_group_without_a_lane_left_runs_no_further():
    told = []
    result = run([DIVERGING], advance=told.append)
    assert [row.step for row in result.points[0]] == [0, 4]
    assert [(progress.step, progress.running, progress.lane_steps) for progress in told] == [(0, 1, 0), (4, 0, 16)]
    assert (result.useful_steps, result.executed_steps) == (4, 8)


def test_a_killed_group_goes_on_without_the_lanes_that_had_left(tmp_path):
    class Kill(Exception):
        pass

    def advance(progress):
        if progress.step > 60:
            raise Kill

    whole = run(LANES, PATIENT, FAST)
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(Kill):
        run(LANES, PATIENT, FAST, checkpoints=checkpoints, advance=advance)
    told = []
    with Checkpoints(tmp_path) as checkpoints:
        resumed = run(LANES, PATIENT, FAST, checkpoints=checkpoints, advance=told.append)
    assert (told[0].step, told[0].running) == (57, 1)
    assert sum(progress.lane_steps for progress in told) == 4 * 96
    assert_same_points(resumed.points, whole.points)
    assert_same(resumed.state, whole.state)
    assert (resumed.useful_steps, resumed.executed_steps) == (whole.useful_steps, whole.executed_steps)


# A loss that explodes.


def test_an_explosion_above_the_ceiling_is_recorded_with_its_reason_and_touches_no_other_lane():
    rates, timing = {"vision": 0.1, "llm": 100.0}, schedule([0, 4, 8], ceiling=loss_ceiling(6))
    exploding = Lane({"vision": 1, "llm": 2}, 8, 0)
    steady = [Lane({"vision": 2, "llm": 0}, 8, 0), Lane({"vision": 4, "llm": 0}, 8, 1)]
    lanes = [steady[0], exploding, steady[1]]
    result = least_model.run(lanes, rates, timing)
    assert [rows[-1].step for rows in result.points] == [8, 4, 8]
    last = result.points[1][-1]
    loss = last.validation_loss
    assert np.isfinite(loss)
    assert loss > 2 * result.points[1][0].validation_loss
    assert last.reason == f"the validation loss exploded to {loss:.3g} nats; guessing evenly gives 1.79"
    assert not last.alive
    record = lane_records(lanes, result.points, ConvergenceRule("drift", 0.5, 1), rates)[1]
    assert (record.status, record.reason, record.steps) == ("diverged", last.reason, 4)
    assert record.convergence_steps == {"vision": None, "llm": None}
    assert record.best_step == 0
    without = least_model.run(steady, rates, timing)
    for k, j in ((0, 0), (1, 2)):
        assert_same_points(without.points[k], result.points[j])
        assert_same(without.lane_state(k), result.lane_state(j))


# The others.


@pytest.fixture(scope="module")
def without():
    """Every steady lane alone in its group: name -> (rows, state)."""
    results = {lane.name: run([lane]) for lane in STEADY}
    return {name: (result.points[0], result.lane_state(0)) for name, result in results.items()}


@pytest.mark.parametrize("place", range(4))
def test_a_diverging_lane_leaves_and_every_other_lane_has_the_bits_of_a_run_in_which_it_never_was(without, place):
    # At places 0 and 1 it shares its block with the lane at the other; once it is gone, blocks and mates change.
    lanes = [*STEADY[:place], DIVERGING, *STEADY[place:]]
    result = run(lanes)
    assert [row.alive for row in result.points[place]] == [True, False]
    assert result.points[place][-1].reason == "the loss was not finite between steps 0 and 4"
    for k, lane in enumerate(lanes):
        if lane != DIVERGING:
            rows, state = without[lane.name]
            assert_same_points(result.points[k], rows)
            assert_same(result.lane_state(k), state)
    assert result.useful_steps == 4 * 4 + 3 * 12
    assert result.executed_steps == 4 * 4 + 4 * 12


def test_a_lane_has_the_same_bits_in_every_slot_and_with_every_mate():
    lanes = LANES[:3]
    expected = {}
    for number in (1, 2, 3):
        for order in itertools.permutations(lanes, number):
            result = run(order, schedule([0, 4, 6]), RATES)
            assert result.slots == list(range(number))
            for k, lane in enumerate(order):
                found = (result.points[k], result.lane_state(k))
                rows, state = expected.setdefault(lane.name, found)
                assert_same_points(found[0], rows)
                assert_same(found[1], state)
            assert result.useful_steps == 6 * number
            assert result.executed_steps == 6 * 2 * math.ceil(number / 2)
