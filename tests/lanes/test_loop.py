"""The host loop over lanes: rows, drift, killing and going on; and what becomes a lane's record."""

import math
from dataclasses import replace

import jax
import numpy as np
import pytest

from mars_jax.errors import ConfigError
from mars_jax.lanes.lane import Lane
from mars_jax.lanes.result import Progress
from mars_jax.lanes.schedule import warmup_multipliers
from mars_jax.laws.convergence.base import ConvergenceRule
from mars_jax.runtime.checkpoint import Checkpoints
from mars_jax.runtime.compile_cache import CompileCounter
from mars_jax.runtime.sharding import lane_sharding
from tests.helpers import tiny_lanes
from tests.helpers.tiny_lanes import LANES, RATES, TARGETS, Stream, assert_same, assert_same_points, schedule

LOOKS = [0, 4, 6, 8, 11, 16]
TIMING = schedule(LOOKS, per_doubling=tiny_lanes.LOOKS_PER_DOUBLING)
DRIFT = ConvergenceRule("drift", 0.5, 1)


def run(lanes=LANES, timing=TIMING, rates=RATES, **changes):
    return tiny_lanes.run(lanes, tiny_lanes.padded_engine(), timing, rates=rates, **changes)


@pytest.fixture(scope="module")
def uninterrupted():
    return run()


class Kill(Exception):
    """What stops a run."""


def run_until(steps, directory, timing=TIMING):
    """Runs until `steps` lane-steps are reported, and is killed there."""
    told = []

    def advance(progress):
        told.append(progress.lane_steps)
        if sum(told) >= steps:
            raise Kill

    with Checkpoints(directory) as checkpoints, pytest.raises(Kill):
        run(timing=timing, checkpoints=checkpoints, advance=advance)


# Looks.


def test_a_look_reads_the_validation_batches_that_it_is_told_to():
    timing = schedule([0, 4], per_doubling=0)
    first = {name: leaf[:1] for name, leaf in tiny_lanes.VALIDATION.items()}
    every = run(timing=timing)
    with CompileCounter() as counter:
        told = run(timing=timing, eval_batches=1)
    assert counter.programs == []
    alone = tiny_lanes.run(LANES, tiny_lanes.engine(tiny_lanes.PADDED, 4, 2), timing, validation=first)
    for some, one, whole in zip(told.points, alone.points, every.points, strict=True):
        for row, expected, other in zip(some, one, whole, strict=True):
            assert row.validation_loss == pytest.approx(expected.validation_loss, rel=1e-6)
            assert abs(row.validation_loss - other.validation_loss) > 1e-4


# Losses of the samples.


def with_weights():
    """Validation batches whose samples have one or two supervised tokens, and a row without a sample."""
    weights = np.ones((2, 4, 2), np.float32)
    weights[0, 1, 1] = weights[1, 3] = 0
    return tiny_lanes.VALIDATION | {"target_weights": weights}


def test_losses_of_samples_are_those_of_the_samples_alone_and_their_mean_is_the_loss():
    validation = with_weights()
    timing = schedule([0, 4], per_doubling=0, keeps_sample_losses=True)
    lanes = run(timing=timing, validation=validation).points
    mean_tokens = 13 / 7
    for points in lanes:
        for point in points:
            assert len(point.sample_losses) == 7
            assert np.mean(point.sample_losses) == pytest.approx(point.validation_loss, rel=1e-6)
    for place, (batch, row, tokens) in enumerate([(0, 1, 1), (1, 2, 2)]):
        only = np.zeros_like(validation["target_weights"])
        only[batch, row, :tokens] = 1
        alone = run(timing=schedule([0, 4], per_doubling=0), validation=validation | {"target_weights": only}).points
        for points, of_sample in zip(lanes, alone, strict=True):
            share = points[-1].sample_losses[[1, 6][place]]
            assert share * mean_tokens / tokens == pytest.approx(of_sample[-1].validation_loss, rel=1e-5)


def test_losses_of_samples_are_kept_only_where_they_are_asked_for(uninterrupted):
    assert {point.sample_losses for points in uninterrupted.points for point in points} == {()}
    assert all("sample_losses" not in point.to_json() for points in uninterrupted.points for point in points)


def test_losses_of_samples_survive_a_kill(tmp_path):
    timing = schedule(LOOKS, keeps_sample_losses=True)
    whole = run(timing=timing)
    run_until(4 * 6, tmp_path, timing)
    with Checkpoints(tmp_path) as checkpoints:
        assert_same_points(run(timing=timing, checkpoints=checkpoints).points, whole.points)


# Rows.


def test_rows_tell_every_look(uninterrupted):
    for rows in uninterrupted.points:
        assert [row.step for row in rows] == LOOKS
        assert rows[0].train_loss is None
        assert all(np.isfinite(row.train_loss) for row in rows[1:])
        assert all(row.alive and row.reason is None for row in rows)
        assert rows[0].update_norm == dict.fromkeys(RATES, 0.0)
        assert rows[-1].validation_loss < rows[0].validation_loss
    # Every lane starts from the base.
    assert len({rows[0].validation_loss for rows in uninterrupted.points}) == 1


def has_drift(rows):
    return [row.step for row in rows if np.isfinite(row.drift["llm"])]


def test_drift_is_told_exactly_where_there_is_a_look_at_half_the_step(uninterrupted):
    for rows in uninterrupted.points:
        assert has_drift(rows) == [8, 11, 16]
    off_the_grid = run(timing=schedule([0, 4, 6, 8, 20], per_doubling=2))
    assert has_drift(off_the_grid.points[0]) == [8]
    no_grid = run(timing=schedule([0, 4, 6, 8]))
    assert has_drift(no_grid.points[0]) == []


def test_drift_is_the_relative_change_of_the_product_since_half_the_step(uninterrupted):
    def product(result, path):
        node = tiny_lanes.padded_engine().layout.unravel(result.lane_state(0).trainable)
        for part in path.split("/"):
            node = node[part]
        return 2.0 * np.matmul(*(np.asarray(node[name], np.float64) for name in ("a", "b")))

    half, whole = (run(timing=schedule(LOOKS[: LOOKS.index(step) + 1])) for step in (4, 8))
    for module, drift in uninterrupted.points[0][LOOKS.index(8)].drift.items():
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
    best = [min(rows[i].validation_loss for rows in uninterrupted.points) for i in range(len(LOOKS))]
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


def test_a_seed_of_the_inputs_draws_the_adapters_of_lanes_with_that_seed_added():
    # The config's seed changed the order of the data and left every run the same adapters.
    timing = schedule([0, 4], per_doubling=0)
    moved = run(timing=timing, seed=3, stream=Stream(LANES[0]))
    lanes = [replace(lane, seed=lane.seed + 3) for lane in LANES]
    assert_same_points(moved.points, run(lanes=lanes, timing=timing, stream=Stream(LANES[0])).points)
    assert moved.points[0][-1].validation_loss != run(timing=timing).points[0][-1].validation_loss


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
    assert_same_points(resumed.points, uninterrupted.points)
    assert_same(resumed.state, uninterrupted.state)
    assert (resumed.useful_steps, resumed.executed_steps) == (4 * LOOKS[-1], 4 * LOOKS[-1])


def test_a_resumed_group_was_compiled_again(uninterrupted, tmp_path):
    run_until(4 * 6, tmp_path)
    with Checkpoints(tmp_path) as checkpoints, CompileCounter() as counter:
        run(checkpoints=checkpoints)
    assert not [name for name in counter.programs if "chunk" in name or "init" in name]


def test_a_checkpoint_restores_onto_a_mesh(tmp_path):
    run_until(4 * 8, tmp_path)
    expected = run(timing=schedule(LOOKS[:3], per_doubling=2)).state
    by_lane = lane_sharding(tiny_lanes.mesh({"lane": 4, "data": 2}))
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=by_lane), expected)
    with Checkpoints(tmp_path) as checkpoints:
        step, state, document = checkpoints.restore(abstract)
    assert step == 6
    assert [point["step"] for point in document["points"][0]] == [0, 4, 6]
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
    first, told = run(timing=schedule(LOOKS[:3], per_doubling=2)), []
    second = run(start=first, advance=lambda progress: told.append(progress.lane_steps))
    assert sum(told) == 4 * (LOOKS[-1] - LOOKS[2])
    assert_same_points(second.points, uninterrupted.points)
    assert_same(second.state, uninterrupted.state)
    assert second.useful_steps == uninterrupted.useful_steps


def test_progress_told_a_loss_of_nan_before_the_first_look():
    assert Progress(0, 0, 1, math.nan).text == ""
    assert Progress(8, 8, 1, 1.23456).text == "validation loss 1.235"


def test_progress_survived_no_group_whose_lanes_had_all_diverged():
    told = []
    result = run(timing=schedule([0, 4, 8]), rates=dict.fromkeys(RATES, 1e30), advance=told.append)
    assert not any(rows[-1].alive for rows in result.points)
    # The steps that were saved are reported as done.
    assert (told[-1].step, told[-1].running, sum(progress.lane_steps for progress in told)) == (4, 0, 4 * 8)
    assert math.isnan(told[-1].loss)
