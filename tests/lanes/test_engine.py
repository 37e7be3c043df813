"""Lanes in one compiled program: equal to the same lanes alone, isolated from each other, compiled once."""

import jax
import numpy as np
import pytest

from mars_jax.adapters.tree import split_trainable, trim
from mars_jax.lanes.lane import Lane
from mars_jax.lanes.result import GroupResult, best_adapters
from mars_jax.lanes.schedule import warmup_multipliers
from mars_jax.runtime.compile_cache import CompileCounter
from mars_jax.runtime.trees import flatten
from tests.helpers import least_model, tiny_lanes
from tests.helpers.tiny_lanes import LANES, RATES, TARGETS, assert_same, assert_same_points, schedule

EIGHT_STEPS = schedule([0, 3, 8])


def run(lanes, engine, timing=EIGHT_STEPS, **changes):
    return tiny_lanes.run(lanes, engine, timing, **changes)


@pytest.fixture(scope="module")
def together():
    """Four lanes, padded and in one program."""
    return run(LANES, tiny_lanes.padded_engine())


def adapters(engine, state):
    return engine.layout.adapters(state.trainable, state.fixed)


def test_a_padded_lane_among_others_equals_the_lane_alone_and_unpadded(together):
    k, lane = 2, LANES[2]
    assert [tiny_lanes.PADDED[module] - rank for module, rank in lane.ranks.items()] == [2, 2, 3]
    engine = tiny_lanes.engine(lane.ranks)
    alone = run([lane], engine)
    for left, right in zip(alone.points[0], together.points[k], strict=True):
        for name in ("step", "validation_loss", "update_norm"):
            assert getattr(left, name) == pytest.approx(getattr(right, name), rel=1e-6), name
    for left, right in zip(alone.points[0][1:], together.points[k][1:], strict=True):
        assert left.train_loss == pytest.approx(right.train_loss, rel=1e-6)
    assert alone.points[0][-1].validation_loss < alone.points[0][0].validation_loss - 0.02
    expected = flatten(adapters(engine, alone.lane_state(0)))
    actual = adapters(tiny_lanes.padded_engine(), together.lane_state(k))
    trimmed = flatten(trim(actual, TARGETS, lane.ranks))
    assert expected.keys() == trimmed.keys()
    for path, leaf in expected.items():
        np.testing.assert_allclose(trimmed[path], leaf, rtol=0, atol=1e-6, err_msg=path)
    # What was padded is still zero, bit for bit.
    for path, leaf in flatten(split_trainable(actual)[0]).items():
        rank = lane.ranks[TARGETS[path.rpartition("/")[0]].module]
        assert not (leaf[..., rank:] if path.endswith("/a") else leaf[..., rank:, :]).any()


def test_a_module_of_rank_0_does_not_move_by_a_bit(together):
    assert [set(LANES[k].ranks) - set(LANES[k].adapted) for k in (2, 3)] == [{"projector"}, {"projector", "vision"}]
    for k, frozen in ((2, ["projector"]), (3, ["projector", "vision"])):
        trainable = tiny_lanes.padded_engine().layout.unravel(together.lane_state(k).trainable)
        assert not any(leaf.any() for module in frozen for leaf in jax.tree.leaves(trainable[module]))
        assert all(together.points[k][-1].update_norm[module] == 0.0 for module in frozen)
        assert together.points[k][-1].update_norm["llm"] > 0.01


def test_the_best_look_is_kept(together):
    engine = tiny_lanes.padded_engine()
    for k, (lane, rows) in enumerate(zip(LANES, together.points, strict=True)):
        state = together.lane_state(k)
        best = min(rows, key=lambda row: row.validation_loss)
        assert (int(state.best_step), float(state.best_loss)) == (best.step, best.validation_loss)
        assert best.step == 8
        assert_same(state.best, state.trainable)
        whole = trim(adapters(engine, state), TARGETS, lane.ranks)
        assert_same(best_adapters(engine, together, k, lane), whole)


def with_learning_rate(rate):
    """Runs the four lanes, lane 1 with its own learning rate from step 0 on."""
    start = run(LANES, tiny_lanes.padded_engine(), schedule([0]))
    rates = {module: rates.at[start.slots[1]].set(rate) for module, rates in start.state.learning_rates.items()}
    changed = GroupResult(start.points, start.state._replace(learning_rates=rates), start.slots, 0, 0)
    return run(LANES, tiny_lanes.padded_engine(), start=changed)


def test_a_lane_that_diverges_stands_still_from_its_first_loss_that_is_not_finite():
    diverged = with_learning_rate(1e30)
    rows = diverged.points[1]
    # It leaves at the look that shows it.
    assert [row.alive for row in rows] == [True, False]
    assert not np.isfinite(rows[1].validation_loss)
    state = diverged.lane_state(1)
    assert not state.alive
    assert int(state.best_step) == 0
    before = run(LANES, tiny_lanes.padded_engine(), schedule([0, 3]))
    assert int(state.optimizer[1].count) < 3
    assert int(before.lane_state(1).optimizer[1].count) == 3


def test_a_lane_that_has_its_own_learning_rate_moves_by_it(together):
    slower = with_learning_rate(RATES["llm"] / 10)
    assert slower.points[1][-1].update_norm["llm"] < 0.3 * together.points[1][-1].update_norm["llm"]
    assert_same_points(slower.points[0], together.points[0])


def test_any_linen_model_compiles_once_whatever_the_lanes_ranks_seeds_rates_and_schedule():
    groups = [
        ([Lane({"vision": 4, "llm": 4}, 8, 0), Lane({"vision": 1, "llm": 2}, 8, 1)], 0.1, [0, 4, 9], "constant"),
        ([Lane({"vision": 2, "llm": 0}, 4, 2), Lane({"vision": 0, "llm": 3}, 8, 3)], 0.03, [0, 1, 2, 14], "cosine"),
        ([Lane({"vision": 3, "llm": 1}, 4, seed) for seed in range(3)], 0.1, [0, 9], "linear"),
    ]
    least_model.base()
    least_model.engine.cache_clear()
    compiled = []
    for lanes, rate, looks, shape in groups:
        timing = schedule(looks, multipliers=warmup_multipliers(looks[-1], 2, shape))
        with CompileCounter() as counter:
            result = least_model.run(lanes, {"vision": rate, "llm": rate / 2}, timing)
        compiled.append(counter.programs)
        assert all(rows[-1].validation_loss < rows[0].validation_loss for rows in result.points)
    assert [sum("chunk" in name or "init" in name for name in names) for names in compiled] == [2, 0, 0]
    assert compiled[1:] == [[], []]
