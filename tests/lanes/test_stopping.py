"""Lanes that leave: why and when they do, and that no other lane's bits tell that they were ever there."""

import itertools
import math

import numpy as np
import pytest

from mars_jax.lanes.lane import Lane
from mars_jax.lanes.schedule import look_steps
from mars_jax.lanes.stopping import Leaving, ceiling_of
from mars_jax.laws.convergence.base import ConvergenceRule
from mars_jax.runtime.checkpoint import Checkpoints
from mars_jax.search.probes.records import lane_records
from tests.helpers import least_model, tiny_lanes
from tests.helpers.tiny_lanes import LANES, RATES, assert_same, schedule

# Only lanes that adapt the vision module diverge at this rate, so they are told apart within one group.
WILD = RATES | {"vision": 1e30}
DIVERGING = LANES[0]
STEADY = [Lane({"vision": 0, "projector": p, "llm": n}, 8, 1) for p, n in ((2, 4), (1, 1), (0, 3))]
TIMING = schedule([0, 4, 6, 8, 11, 16], looks_per_doubling=2)
# At this rate the lanes over-fit, each from its own step on.
FAST = dict.fromkeys(RATES, 3e-2)
PATIENT = schedule(look_steps(96, 4), leaving=Leaving(1.5))


def run(lanes, timing=TIMING, rates=WILD, **changes):
    return tiny_lanes.run(lanes, tiny_lanes.padded_engine(), timing, learning_rates=rates, **changes)


def rows_of(*losses):
    """Rows of a lane, a look every 10 steps."""
    return [{"step": 10 * i, "validation_loss": loss, "alive": True} for i, loss in enumerate(losses)]


# Why and when.


def test_a_lane_leaves_at_its_first_look_that_is_patience_times_its_best_step():
    leaving = Leaving(patience=2.0)
    rows = rows_of(4.0, 3.0, 2.0, 2.5, 2.4)
    assert [leaving.running([rows[: looks + 1]]) for looks in range(5)] == [[0], [0], [0], [0], []]
    assert leaving.running([rows, rows_of(4.0, 3.0, 2.0, 2.5, 1.9)]) == [1]
    assert Leaving(patience=2.1).running([rows]) == [0]
    assert Leaving().running([rows]) == [0]


def test_a_lane_that_has_not_improved_yet_does_not_leave():
    assert Leaving(patience=1.5).running([rows_of(4.0, 5.0, 5.0, 4.5)]) == [0]
    assert Leaving(patience=1.5).running([[]]) == [0]


def test_a_lane_that_is_not_alive_leaves_whatever_the_patience():
    rows = [*rows_of(4.0, 3.0), {"step": 20, "validation_loss": math.nan, "alive": False}]
    for leaving in (Leaving(), Leaving(patience=2.0)):
        assert leaving.running([rows, rows_of(4.0, 3.0, 2.9)]) == [1]


def test_a_loss_diverges_above_the_ceiling_and_above_twice_its_first():
    leaving = Leaving(ceiling=ceiling_of(100))
    assert ceiling_of(100) == pytest.approx(1.5 * math.log(100)) == pytest.approx(6.9078, abs=1e-4)
    assert leaving.divergence(3.0, 6.90) is None
    assert leaving.divergence(3.0, 6.91) == "the validation loss exploded to 6.91 nats; guessing evenly gives 4.61"
    # A base that is worse than guessing has not diverged by being itself.
    assert leaving.divergence(5.0, 9.9) is None
    assert leaving.divergence(5.0, 10.1) == "the validation loss exploded to 10.1 nats; guessing evenly gives 4.61"
    for loss in (math.nan, math.inf):
        assert leaving.divergence(3.0, loss) == "the validation loss was not finite"
    assert Leaving().divergence(3.0, 1e30) is None


def test_lanes_that_ran_with_patience_have_the_rows_of_those_without_up_to_their_own_end():
    patient, whole = run(LANES, PATIENT, FAST), run(LANES, schedule(PATIENT.looks), FAST)
    ends = [rows[-1]["step"] for rows in patient.rows]
    assert len(set(ends)) > 2
    assert max(ends) == 96
    for rows, all_rows in zip(patient.rows, whole.rows, strict=True):
        np.testing.assert_equal(rows, all_rows[: len(rows)])
        best = min(rows, key=lambda row: row["validation_loss"])["step"]
        assert (rows[-1]["step"] < 96) == (best * 1.5 <= rows[-1]["step"])
        assert rows[-2]["step"] < 1.5 * min(rows[:-1], key=lambda row: row["validation_loss"])["step"]
    # Each step has room for two lanes a block.
    active = [sum(step < end for end in ends) for step in range(96)]
    assert patient.useful_steps == sum(ends) == sum(active)
    assert patient.executed_steps == sum(2 * math.ceil(count / 2) for count in active) < whole.executed_steps == 4 * 96


def test_a_lane_that_left_with_patience_is_recorded_with_its_own_last_step():
    patient = run(LANES, schedule(PATIENT.looks, looks_per_doubling=4, leaving=Leaving(1.5)), FAST)
    records = lane_records(LANES, patient.rows, ConvergenceRule("drift", 0.9, 1), FAST)
    assert [record["steps"] for record in records] == [rows[-1]["step"] for rows in patient.rows]
    assert {record["status"] for record in records} <= {"converged", "horizon"}
    for record in records:
        assert all(steps <= record["steps"] for steps in record["convergence_steps"].values())


def test_a_group_without_a_lane_left_runs_no_further():
    told = []
    result = run([DIVERGING], advance=told.append)
    assert [row["step"] for row in result.rows[0]] == [0, 4]
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
    np.testing.assert_equal(resumed.rows, whole.rows)
    assert_same(resumed.state, whole.state)
    assert (resumed.useful_steps, resumed.executed_steps) == (whole.useful_steps, whole.executed_steps)


# A loss that explodes.


def test_an_explosion_above_the_ceiling_is_recorded_with_its_reason_and_touches_no_other_lane():
    rates, timing = {"vision": 0.1, "llm": 100.0}, schedule([0, 4, 8], leaving=Leaving(ceiling=ceiling_of(6)))
    exploding = Lane({"vision": 1, "llm": 2}, 8, 0)
    steady = [Lane({"vision": 2, "llm": 0}, 8, 0), Lane({"vision": 4, "llm": 0}, 8, 1)]
    lanes = [steady[0], exploding, steady[1]]
    result = least_model.run(lanes, rates, timing)
    assert [rows[-1]["step"] for rows in result.rows] == [8, 4, 8]
    last = result.rows[1][-1]
    loss = last["validation_loss"]
    assert np.isfinite(loss)
    assert loss > 2 * result.rows[1][0]["validation_loss"]
    assert last["reason"] == f"the validation loss exploded to {loss:.3g} nats; guessing evenly gives 1.79"
    assert not last["alive"]
    record = lane_records(lanes, result.rows, ConvergenceRule("drift", 0.5, 1), rates)[1]
    assert (record["status"], record["reason"], record["steps"]) == ("diverged", last["reason"], 4)
    assert record["convergence_steps"] == {"vision": None, "llm": None}
    assert record["best_step"] == 0
    without = least_model.run(steady, rates, timing)
    for k, j in ((0, 0), (1, 2)):
        np.testing.assert_equal(without.rows[k], result.rows[j])
        assert_same(without.lane_state(k), result.lane_state(j))


# The others.


@pytest.fixture(scope="module")
def without():
    """Every steady lane alone in its group: name -> (rows, state)."""
    results = {lane.name: run([lane]) for lane in STEADY}
    return {name: (result.rows[0], result.lane_state(0)) for name, result in results.items()}


@pytest.mark.parametrize("place", range(4))
def test_a_diverging_lane_leaves_and_every_other_lane_has_the_bits_of_a_run_in_which_it_never_was(without, place):
    # At places 0 and 1 it shares its block with the lane at the other; once it is gone, blocks and mates change.
    lanes = [*STEADY[:place], DIVERGING, *STEADY[place:]]
    result = run(lanes)
    assert [row["alive"] for row in result.rows[place]] == [True, False]
    assert result.rows[place][-1]["reason"] == "the loss was not finite between steps 0 and 4"
    for k, lane in enumerate(lanes):
        if lane != DIVERGING:
            rows, state = without[lane.name]
            np.testing.assert_equal(result.rows[k], rows)
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
                found = (result.rows[k], result.lane_state(k))
                rows, state = expected.setdefault(lane.name, found)
                np.testing.assert_equal(found[0], rows)
                assert_same(found[1], state)
            assert result.useful_steps == 6 * number
            assert result.executed_steps == 6 * 2 * math.ceil(number / 2)
