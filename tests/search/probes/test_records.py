"""What becomes of a lane's eval points: its record, and its curve in curves.jsonl."""

import json
from dataclasses import replace

import numpy as np
import pytest

from mars_jax.errors import NoValidResultError
from mars_jax.job import files
from mars_jax.job.directory import RunDirectory
from mars_jax.lanes.eval_points import EvalPoint, ModuleSwaps
from mars_jax.lanes.lane import Lane
from mars_jax.lanes.schedule import eval_steps, warmup_multipliers
from mars_jax.laws.convergence.base import ConvergenceRule
from mars_jax.laws.records import LaneRecord
from mars_jax.runtime.jsonfiles import append_jsonl, dump_json, read_jsonl
from mars_jax.search.probes.records import lane_records
from mars_jax.search.probes.run import append_curves, recorded_points
from tests.helpers import tiny_lanes
from tests.helpers.tiny_lanes import LANES, RATES, assert_same_points, schedule

TIMING = schedule([0, 4, 6, 8, 11, 16], per_doubling=tiny_lanes.LOOKS_PER_DOUBLING)
DRIFT = ConvergenceRule("drift", 0.5, 1)


def run(timing=TIMING, rates=RATES):
    return tiny_lanes.run(LANES, tiny_lanes.padded_engine(), timing, rates=rates)


def test_the_drift_rule_tells_a_time_for_every_module_that_moved():
    looks = eval_steps(512, 2)
    # The learning rate falls to zero, so that every module comes to rest.
    timing = schedule(looks, per_doubling=2, multipliers=warmup_multipliers(512, 2, "cosine"))
    for lane, record in zip(LANES, lane_records(LANES, run(timing=timing).points, DRIFT, RATES), strict=True):
        assert record.lane == lane.name
        assert list(record.convergence_steps) == lane.adapted == list(record.update_norm)
        assert all(64 < steps < 512 for steps in record.convergence_steps.values())
        assert not any(record.censored.values())
        assert (record.status, record.reason) == ("converged", None)
        assert record.best_loss < 3.0


def test_lanes_that_still_learn_at_the_horizon_are_censored():
    timing = schedule(eval_steps(32, 2), per_doubling=2)
    for lane, record in zip(LANES, lane_records(LANES, run(timing=timing).points, DRIFT, RATES), strict=True):
        assert record.convergence_steps == dict.fromkeys(lane.adapted, 32.0)
        assert all(record.censored.values())
        assert (record.status, record.reason) == (
            "horizon",
            f"{', '.join(lane.adapted)} had not converged at step 32",
        )


@pytest.mark.parametrize("still", ["projector", "vision"])
def test_a_module_that_did_not_move_is_an_error_that_names_module_and_lane(still):
    result = run(timing=schedule([0, 4]), rates=RATES | {still: 0.0})
    text = f"module '{still}' did not move in lane {LANES[0].name} .update norm 0.0 after 4 steps.*learning rate .0.0"
    with pytest.raises(NoValidResultError, match=text):
        lane_records(LANES, result.points, DRIFT, RATES | {still: 0.0})


def test_a_lane_that_diverged_is_recorded_with_its_reason_and_without_times():
    result = run(rates=dict.fromkeys(RATES, 1e30))
    for lane, record in zip(LANES, lane_records(LANES, result.points, DRIFT, RATES), strict=True):
        assert record.status == "diverged"
        assert record.reason == "the loss was not finite between steps 0 and 4"
        assert record.convergence_steps == dict.fromkeys(lane.adapted)
        assert not any(record.censored.values())
        assert (record.best_step, record.best_loss) == (0, result.points[0][0].validation_loss)


def points_of(losses, drift=np.nan, reason=None):
    """Eval points of a lane of one module, one every 10 steps, the last with the reason why it stopped."""
    return [
        EvalPoint(
            10 * i,
            loss,
            train_loss=loss,
            update_norm={"llm": 1.0 if i else 0.0},
            drift={"llm": drift},
            alive=i + 1 < len(losses) or reason is None,
            reason=reason if i + 1 == len(losses) else None,
        )
        for i, loss in enumerate(losses)
    ]


ALONE = Lane({"llm": 4}, 8, 0)


def test_a_frozen_diverged_lane_passed_for_converged():
    points = points_of(
        [4.0, 3.0, 3.0, 3.0, 3.0, 3.0], drift=0.0, reason="the loss was not finite between steps 40 and 50"
    )
    (record,) = lane_records([ALONE], [points], DRIFT, {"llm": 1.0})
    assert record.convergence_steps == {"llm": None}
    assert (record.status, record.reason) == ("diverged", "the loss was not finite between steps 40 and 50")


@pytest.mark.parametrize(("rule", "losses"), [("loss_fraction", [3.0, 3.5, 4.0, 5.0]), ("drift", [4.0, 3.0, 2.0, 1.0])])
def test_a_lane_without_a_time_passed_for_converged(rule, losses):
    (record,) = lane_records([ALONE], [points_of(losses)], ConvergenceRule(rule, 0.1, 1), {"llm": 1.0})
    assert record.convergence_steps == {"llm": None}
    assert (record.status, record.reason) == ("horizon", "llm showed nothing to converge to by step 30")


def test_loss_fraction_speaks_of_lanes_that_adapt_one_module():
    rule = ConvergenceRule("loss_fraction", 0.1, 3)
    both = [replace(point, update_norm={"vision": 1.0, "llm": 1.0}) for point in points_of([4.0, 2.0] + [1.0] * 10)]
    single = points_of([4.0, 2.0, 1.0] + [1.001] * 9)
    lanes = [Lane({"vision": 2, "llm": 4}, 8, 0), Lane({"vision": 0, "llm": 4}, 8, 0)]
    joint, alone = lane_records(lanes, [both, single], rule, {"vision": 1.0, "llm": 1.0})
    assert joint.convergence_steps == {}
    assert (joint.status, joint.reason) == ("horizon", "the rule speaks of lanes that adapt one module")
    assert (alone.status, alone.reason) == ("converged", None)
    # The loss is 0.3 above its best, a tenth of the drop of 3, at seven tenths of the way from step 10 to step 20.
    assert alone.convergence_steps["llm"] == pytest.approx(17.0, abs=0.1)


def test_a_censored_lane_says_which_module_had_not_converged():
    (record,) = lane_records([ALONE], [points_of([4.0, 3.0, 2.0, 1.0], drift=0.9)], DRIFT, {"llm": 1.0})
    assert (record.status, record.reason) == ("horizon", "llm had not converged at step 30")
    assert (record.convergence_steps, record.censored) == ({"llm": 30.0}, {"llm": True})


def test_a_curve_cut_short_by_a_kill_stayed_short(tmp_path):
    directory, points = RunDirectory(tmp_path), points_of([4.0, 3.0, 2.0])
    for point in points[:2]:
        append_jsonl(directory / files.CURVES, {"lane": ALONE.name, **point.to_json()})
    append_curves(directory, (ALONE,), [points], recorded_points(directory))
    found = read_jsonl(directory / files.CURVES, pytest.fail)
    assert [(row["lane"], row["step"]) for row in found] == [(ALONE.name, step) for step in (0, 10, 20)]


def test_an_eval_point_is_the_same_after_json():
    points = points_of([4.0, 3.0, 2.0], reason="the validation loss was not finite")
    swapped = replace(points[1], swaps=ModuleSwaps({"llm": 0.5}, 0.1, {"": 3.0, "llm": 2.5}))
    for point in (*points, swapped):
        again = EvalPoint.from_json(json.loads(dump_json(point.to_json())))
        assert_same_points([again], [point])
    assert list(swapped.to_json())[-3:] == ["remaining", "interaction", "hybrids"]


def test_a_lane_record_is_the_same_after_json():
    (record,) = lane_records([ALONE], [points_of([4.0, 3.0, 2.0, 1.0], drift=0.9)], DRIFT, {"llm": 1.0})
    assert LaneRecord.from_json(json.loads(dump_json(record.to_json()))) == record
