"""The host loop over lanes: rows, drift, killing and going on; and what becomes a lane's record."""

import math
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from mars_jax.errors import ConfigError, NoValidResultError
from mars_jax.lanes.lane import Lane
from mars_jax.lanes.result import Progress
from mars_jax.lanes.schedule import look_steps, warmup_multipliers
from mars_jax.laws.convergence.base import ConvergenceRule
from mars_jax.runtime.checkpoint import Checkpoints
from mars_jax.runtime.compile_cache import CompileCounter
from mars_jax.runtime.jsonfiles import append_jsonl, read_jsonl
from mars_jax.runtime.sharding import lane_sharding
from mars_jax.search.probes import run as search
from mars_jax.search.probes.records import lane_records
from tests.helpers import tiny_lanes
from tests.helpers.tiny_lanes import LANES, RATES, TARGETS, Stream, assert_same, schedule

LOOKS = [0, 4, 6, 8, 11, 16]
TIMING = schedule(LOOKS, looks_per_doubling=tiny_lanes.LOOKS_PER_DOUBLING)
DRIFT = ConvergenceRule("drift", 0.5, 1)


def run(lanes=LANES, timing=TIMING, rates=RATES, **changes):
    return tiny_lanes.run(lanes, tiny_lanes.padded_engine(), timing, learning_rates=rates, **changes)


@pytest.fixture(scope="module")
def uninterrupted():
    return run()


class Kill(Exception):
    """What stops a run."""


def run_until(steps, directory):
    """Runs until `steps` lane-steps are told, and is killed there."""
    told = []

    def advance(progress):
        told.append(progress.lane_steps)
        if sum(told) >= steps:
            raise Kill

    with Checkpoints(directory) as checkpoints, pytest.raises(Kill):
        run(checkpoints=checkpoints, advance=advance)


# Looks.


def test_a_look_reads_the_validation_batches_that_it_is_told_to():
    timing = schedule([0, 4], looks_per_doubling=0)
    first = {name: leaf[:1] for name, leaf in tiny_lanes.VALIDATION.items()}
    every = run(timing=timing)
    with CompileCounter() as counter:
        told = run(timing=timing, look_batches=1)
    assert counter.programs == []
    alone = tiny_lanes.run(LANES, tiny_lanes.engine(tiny_lanes.PADDED, 4, 2), timing, validation=first)
    for some, one, whole in zip(told.rows, alone.rows, every.rows, strict=True):
        for row, expected, other in zip(some, one, whole, strict=True):
            assert row["validation_loss"] == pytest.approx(expected["validation_loss"], rel=1e-6)
            assert abs(row["validation_loss"] - other["validation_loss"]) > 1e-4


# Rows.


def test_rows_tell_every_look(uninterrupted):
    for rows in uninterrupted.rows:
        assert [row["step"] for row in rows] == LOOKS
        assert rows[0]["train_loss"] is None
        assert all(np.isfinite(row["train_loss"]) for row in rows[1:])
        assert all(row["alive"] and row["reason"] is None for row in rows)
        assert rows[0]["update_norm"] == dict.fromkeys(RATES, 0.0)
        assert rows[-1]["validation_loss"] < rows[0]["validation_loss"]
    # Every lane starts from the base.
    assert len({rows[0]["validation_loss"] for rows in uninterrupted.rows}) == 1


def has_drift(rows):
    return [row["step"] for row in rows if np.isfinite(row["drift"]["llm"])]


def test_drift_is_told_exactly_where_there_is_a_look_at_half_the_step(uninterrupted):
    for rows in uninterrupted.rows:
        assert has_drift(rows) == [8, 11, 16]
    off_the_grid = run(timing=schedule([0, 4, 6, 8, 20], looks_per_doubling=2))
    assert has_drift(off_the_grid.rows[0]) == [8]
    no_grid = run(timing=schedule([0, 4, 6, 8]))
    assert has_drift(no_grid.rows[0]) == []


def test_drift_is_the_relative_change_of_the_product_since_half_the_step(uninterrupted):
    def product(result, path):
        node = tiny_lanes.padded_engine().layout.unravel(result.lane_state(0).trainable)
        for part in path.split("/"):
            node = node[part]
        return 2.0 * np.matmul(*(np.asarray(node[name], np.float64) for name in ("a", "b")))

    half, whole = (run(timing=schedule(LOOKS[: LOOKS.index(step) + 1])) for step in (4, 8))
    for module, drift in uninterrupted.rows[0][LOOKS.index(8)]["drift"].items():
        paths = [path for path, target in TARGETS.items() if target.module == module]
        after = [product(whole, path) for path in paths]
        change = [new - product(half, path) for new, path in zip(after, paths, strict=True)]
        ratio = np.sqrt(sum((c**2).sum() for c in change) / sum((a**2).sum() for a in after))
        assert drift == pytest.approx(ratio, rel=1e-4)


def test_the_lanes_of_a_group_share_batches_made_once():
    made = []

    class Noted(Stream):
        def __getitem__(self, step):
            made.append(step)
            return super().__getitem__(step)

    run(timing=schedule([0, 8]), stream=Noted(LANES[0]))
    # The look at step 0 has no steps of its own and takes any batch; so do places past the last step.
    assert made.count(0) == 2
    assert made[1:] == list(range(8))


def test_progress_tells_every_lane_step_once_and_how_it_stands(uninterrupted):
    told = []
    run(advance=told.append)
    assert [progress.step for progress in told] == [0, 4, 6, 8, 11, 15, 16]
    assert [progress.lane_steps for progress in told] == [0, 16, 8, 8, 12, 16, 4]
    assert {progress.running for progress in told} == {4}
    best = [min(rows[i]["validation_loss"] for rows in uninterrupted.rows) for i in range(len(LOOKS))]
    np.testing.assert_equal([progress.loss for progress in told], [math.nan, *best[1:5], best[4], best[5]])


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 0.75, 0.5, 0.25, 0]),
        ("cosine", [0.5, 1, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5, 0]),
    ],
)
def test_multipliers_warm_up_and_fall(shape, expected):
    multipliers = warmup_multipliers(6, 2, shape)
    assert multipliers.dtype == np.float32
    np.testing.assert_allclose(multipliers, expected, atol=1e-6)


# Killing and going on.


@pytest.mark.parametrize("killed_at", [6, 11])
def test_a_killed_run_goes_on_bit_for_bit(uninterrupted, killed_at, tmp_path):
    run_until(4 * killed_at, tmp_path)
    told = []
    with Checkpoints(tmp_path) as checkpoints:
        resumed = run(checkpoints=checkpoints, advance=lambda progress: told.append(progress.lane_steps))
    # It started at the look before the one at which it was killed.
    assert told[0] == 4 * LOOKS[LOOKS.index(killed_at) - 1] > 0
    assert sum(told) == 4 * LOOKS[-1]
    np.testing.assert_equal(resumed.rows, uninterrupted.rows)
    assert_same(resumed.state, uninterrupted.state)
    assert (resumed.useful_steps, resumed.executed_steps) == (4 * LOOKS[-1], 4 * LOOKS[-1])


def test_a_resumed_group_was_compiled_again(uninterrupted, tmp_path):
    run_until(4 * 6, tmp_path)
    with Checkpoints(tmp_path) as checkpoints, CompileCounter() as counter:
        run(checkpoints=checkpoints)
    assert not [name for name in counter.programs if "chunk" in name or "init" in name]


def test_a_checkpoint_restores_onto_a_mesh(tmp_path):
    run_until(4 * 8, tmp_path)
    expected = run(timing=schedule(LOOKS[:3], looks_per_doubling=2)).state
    by_lane = lane_sharding(tiny_lanes.mesh({"lane": 4, "data": 2}))
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=by_lane), expected)
    with Checkpoints(tmp_path) as checkpoints:
        step, state, document = checkpoints.restore(abstract)
    assert step == 6
    assert [row["step"] for row in document["rows"][0]] == [0, 4, 6]
    assert {leaf.sharding for leaf in jax.tree.leaves(state)} == {by_lane}
    assert len(state.best_loss.sharding.device_set) == 8
    assert_same(state, expected)


def test_a_checkpoint_took_rows_that_were_added_while_it_was_written(tmp_path):
    for attempt in range(5):
        document = {"lanes": ["a"], "rows": [[1]]}
        with Checkpoints(tmp_path / str(attempt)) as checkpoints:
            checkpoints.save(1, {"x": np.zeros(3)}, document)
            document["rows"][0].append(2)
        with Checkpoints(tmp_path / str(attempt)) as checkpoints:
            assert checkpoints.restore({"x": np.zeros(3)})[2] == {"lanes": ["a"], "rows": [[1]]}


def test_checkpoints_of_other_lanes_are_refused(tmp_path):
    run_until(4 * 6, tmp_path)
    others = [*LANES[:3], Lane({"vision": 1, "projector": 1, "llm": 1}, 8, 1)]
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.raises(ConfigError, match=f"the checkpoints in {tmp_path} are of the lanes .* Delete the folder"),
    ):
        run(others, checkpoints=checkpoints)


def test_an_empty_folder_holds_no_checkpoint(tmp_path):
    with Checkpoints(tmp_path / "new") as checkpoints:
        assert checkpoints.restore({"x": np.zeros(3)}) is None


def test_going_on_from_a_result_counted_its_steps_twice(uninterrupted):
    first, told = run(timing=schedule(LOOKS[:3], looks_per_doubling=2)), []
    second = run(start=first, advance=lambda progress: told.append(progress.lane_steps))
    assert sum(told) == 4 * (LOOKS[-1] - LOOKS[2])
    np.testing.assert_equal(second.rows, uninterrupted.rows)
    assert_same(second.state, uninterrupted.state)
    assert second.useful_steps == uninterrupted.useful_steps


def test_progress_told_a_loss_of_nan_before_the_first_look():
    assert Progress(0, 0, 1, math.nan).text == ""
    assert Progress(8, 8, 1, 1.23456).text == "validation loss 1.235"


def test_progress_survived_no_group_whose_lanes_had_all_diverged():
    told = []
    result = run(timing=schedule([0, 4, 8]), rates=dict.fromkeys(RATES, 1e30), advance=told.append)
    assert not any(rows[-1]["alive"] for rows in result.rows)
    # The steps that were saved are told as done.
    assert (told[-1].step, told[-1].running, sum(progress.lane_steps for progress in told)) == (4, 0, 4 * 8)
    assert math.isnan(told[-1].loss)


# Records.


def test_the_drift_rule_tells_a_time_for_every_module_that_moved():
    looks = look_steps(512, 2)
    # The learning rate falls to zero, so that every module comes to rest.
    timing = schedule(looks, looks_per_doubling=2, multipliers=warmup_multipliers(512, 2, "cosine"))
    for lane, record in zip(LANES, lane_records(LANES, run(timing=timing).rows, DRIFT, RATES), strict=True):
        assert record["lane"] == lane.name
        assert list(record["convergence_steps"]) == lane.adapted == list(record["update_norm"])
        assert all(64 < steps < 512 for steps in record["convergence_steps"].values())
        assert not any(record["censored"].values())
        assert (record["status"], record["reason"]) == ("converged", None)
        assert record["best_loss"] < 3.0


def test_lanes_that_still_learn_at_the_horizon_are_censored():
    timing = schedule(look_steps(32, 2), looks_per_doubling=2)
    for lane, record in zip(LANES, lane_records(LANES, run(timing=timing).rows, DRIFT, RATES), strict=True):
        assert record["convergence_steps"] == dict.fromkeys(lane.adapted, 32.0)
        assert all(record["censored"].values())
        assert (record["status"], record["reason"]) == (
            "horizon",
            f"{', '.join(lane.adapted)} had not converged at step 32",
        )


@pytest.mark.parametrize("still", ["projector", "vision"])
def test_a_module_that_did_not_move_is_an_error_that_names_module_and_lane(still):
    result = run(timing=schedule([0, 4]), rates=RATES | {still: 0.0})
    text = f"module '{still}' did not move in lane {LANES[0].name} .update norm 0.0 after 4 steps.*learning rate .0.0"
    with pytest.raises(NoValidResultError, match=text):
        lane_records(LANES, result.rows, DRIFT, RATES | {still: 0.0})


def test_a_lane_that_diverged_is_recorded_with_its_reason_and_without_times():
    result = run(rates=dict.fromkeys(RATES, 1e30))
    for lane, record in zip(LANES, lane_records(LANES, result.rows, DRIFT, RATES), strict=True):
        assert record["status"] == "diverged"
        assert record["reason"] == "the loss was not finite between steps 0 and 4"
        assert record["convergence_steps"] == dict.fromkeys(lane.adapted)
        assert not any(record["censored"].values())
        assert (record["best_step"], record["best_loss"]) == (0, result.rows[0][0]["validation_loss"])


def rows_of(losses, drift=np.nan, reason=None):
    """Rows of a lane of one module, a look every 10 steps, the last with the reason why it left."""
    return [
        {
            "step": 10 * i,
            "train_loss": loss,
            "validation_loss": loss,
            "update_norm": {"llm": 1.0 if i else 0.0},
            "drift": {"llm": drift},
            "alive": i + 1 < len(losses) or reason is None,
            "reason": reason if i + 1 == len(losses) else None,
        }
        for i, loss in enumerate(losses)
    ]


ALONE = Lane({"llm": 4}, 8, 0)


def test_a_frozen_diverged_lane_passed_for_converged():
    rows = rows_of([4.0, 3.0, 3.0, 3.0, 3.0, 3.0], drift=0.0, reason="the loss was not finite between steps 40 and 50")
    (record,) = lane_records([ALONE], [rows], DRIFT, {"llm": 1.0})
    assert record["convergence_steps"] == {"llm": None}
    assert (record["status"], record["reason"]) == ("diverged", "the loss was not finite between steps 40 and 50")


@pytest.mark.parametrize(("rule", "losses"), [("loss_fraction", [3.0, 3.5, 4.0, 5.0]), ("drift", [4.0, 3.0, 2.0, 1.0])])
def test_a_lane_without_a_time_passed_for_converged(rule, losses):
    (record,) = lane_records([ALONE], [rows_of(losses)], ConvergenceRule(rule, 0.1, 1), {"llm": 1.0})
    assert record["convergence_steps"] == {"llm": None}
    assert (record["status"], record["reason"]) == ("horizon", "llm showed nothing to converge to by step 30")


def test_loss_fraction_speaks_of_lanes_that_adapt_one_module():
    rule = ConvergenceRule("loss_fraction", 0.1, 3)
    both = [{**row, "update_norm": {"vision": 1.0, "llm": 1.0}} for row in rows_of([4.0, 2.0] + [1.0] * 10)]
    single = rows_of([4.0, 2.0, 1.0] + [1.001] * 9)
    lanes = [Lane({"vision": 2, "llm": 4}, 8, 0), Lane({"vision": 0, "llm": 4}, 8, 0)]
    joint, alone = lane_records(lanes, [both, single], rule, {"vision": 1.0, "llm": 1.0})
    assert joint["convergence_steps"] == {}
    assert (joint["status"], joint["reason"]) == ("horizon", "the rule speaks of lanes that adapt one module")
    assert (alone["status"], alone["reason"]) == ("converged", None)
    # The loss is 0.3 above its best, a tenth of the drop of 3, at seven tenths of the way from step 10 to step 20.
    assert alone["convergence_steps"]["llm"] == pytest.approx(17.0, abs=0.1)


def test_a_censored_lane_says_which_module_had_not_converged():
    (record,) = lane_records([ALONE], [rows_of([4.0, 3.0, 2.0, 1.0], drift=0.9)], DRIFT, {"llm": 1.0})
    assert (record["status"], record["reason"]) == ("horizon", "llm had not converged at step 30")
    assert (record["convergence_steps"], record["censored"]) == ({"llm": 30.0}, {"llm": True})


def test_a_curve_cut_short_by_a_kill_stayed_short(tmp_path):
    directory = SimpleNamespace(curves_file=tmp_path / "curves.jsonl")
    rows = rows_of([4.0, 3.0, 2.0])
    for row in rows[:2]:
        append_jsonl(directory.curves_file, {"lane": ALONE.name, **row})
    search._append_curves(directory, (ALONE,), [rows])
    found = read_jsonl(directory.curves_file, pytest.fail)
    assert [(row["lane"], row["step"]) for row in found] == [(ALONE.name, step) for step in (0, 10, 20)]
