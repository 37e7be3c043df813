"""Lanes in one compiled program: equal to the same lanes alone, isolated from each other, compiled once."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_lanes
from flax import linen as nn
from tiny_lanes import LANES, RATES, TARGETS, VALIDATION, Stream, schedule

from mars_jax import lora
from mars_jax.models.layers import Dense
from mars_jax.probe.engine import make_engine
from mars_jax.probe.loop import GroupResult, run_group, warmup_multipliers
from mars_jax.probe.plan import Lane

EIGHT_STEPS = schedule([0, 3, 8])


def run(lanes, engine, **changes):
    arguments = {"learning_rates": RATES, "schedule": EIGHT_STEPS} | changes
    return run_group(lanes, engine, tiny_lanes.base(), Stream, VALIDATION, **arguments)


@pytest.fixture(scope="module")
def together():
    """Rows and final state of four lanes, padded and in one program, on the host."""
    result = run(LANES, tiny_lanes.padded_engine())
    return GroupResult(result.rows, jax.device_get(result.state))


def lane_state(state, k):
    return jax.tree.map(lambda leaf: leaf[k], state)


def test_a_padded_lane_among_others_equals_the_lane_alone_and_unpadded(together):
    k, lane = 2, LANES[2]
    assert [tiny_lanes.PADDED[module] - rank for module, rank in lane.ranks.items()] == [2, 2, 3]
    alone = run([lane], tiny_lanes.engine(lane.ranks))
    expected, actual = lane_state(alone.state, 0), lane_state(together.state, k)
    for left, right in zip(alone.rows[0], together.rows[k], strict=True):
        for name in ("step", "validation_loss", "update_norm"):
            assert left[name] == pytest.approx(right[name], rel=1e-6), name
    for left, right in zip(alone.rows[0][1:], together.rows[k][1:], strict=True):
        assert left["train_loss"] == pytest.approx(right["train_loss"], rel=1e-6)
    assert alone.rows[0][-1]["validation_loss"] < alone.rows[0][0]["validation_loss"] - 0.02
    unpadded = lora.flatten(lora.join_trainable(expected.trainable, expected.scales))
    trimmed = lora.flatten(lora.trim(lora.join_trainable(actual.trainable, actual.scales), TARGETS, lane.ranks))
    assert unpadded.keys() == trimmed.keys()
    for path, leaf in unpadded.items():
        np.testing.assert_allclose(trimmed[path], leaf, rtol=0, atol=1e-6, err_msg=path)
    # What was padded is still zero, bit for bit.
    for path, leaf in lora.flatten(actual.trainable).items():
        rank = lane.ranks[TARGETS[path.rpartition("/")[0]].module]
        assert not (leaf[..., rank:] if path.endswith("/a") else leaf[..., rank:, :]).any()


def test_a_module_of_rank_0_does_not_move_by_a_bit(together):
    assert [set(LANES[k].ranks) - set(LANES[k].adapted) for k in (2, 3)] == [{"projector"}, {"projector", "vision"}]
    for k, frozen in ((2, ["projector"]), (3, ["projector", "vision"])):
        state = lane_state(together.state, k)
        assert not any(leaf.any() for module in frozen for leaf in jax.tree.leaves(state.trainable[module]))
        assert all(together.rows[k][-1]["update_norm"][module] == 0.0 for module in frozen)
        assert together.rows[k][-1]["update_norm"]["llm"] > 0.01


def test_the_best_look_is_kept(together):
    for k, rows in enumerate(together.rows):
        state = lane_state(together.state, k)
        best = min(rows, key=lambda row: row["validation_loss"])
        assert (int(state.best_step), float(state.best_loss)) == (best["step"], best["validation_loss"])
        if best["step"] == 8:
            jax.tree.map(np.testing.assert_array_equal, state.best, state.trainable)
    assert {int(step) for step in together.state.best_step} == {8}


def with_learning_rate(rate):
    """Runs the four lanes, lane 1 with its own learning rate from step 0 on."""
    result = run(LANES, tiny_lanes.padded_engine(), schedule=schedule([0]))
    rates = {module: rates.at[1].set(rate) for module, rates in result.state.learning_rates.items()}
    start = GroupResult(result.rows, result.state._replace(learning_rates=rates))
    return run(LANES, tiny_lanes.padded_engine(), start=start)


def test_a_diverging_lane_freezes_and_leaves_the_others_bits_alone(together):
    diverged = with_learning_rate(1e30)
    rows = diverged.rows[1]
    assert [row["alive"] for row in rows] == [True, False, False]
    assert not np.isfinite(rows[1]["validation_loss"])
    assert int(diverged.state.best_step[1]) == 0
    for k in (0, 2, 3):
        np.testing.assert_equal(diverged.rows[k], together.rows[k])
        jax.tree.map(np.testing.assert_array_equal, lane_state(diverged.state, k), lane_state(together.state, k))
    # It stands still from the first loss that was not finite.
    before = run(LANES, tiny_lanes.padded_engine(), schedule=schedule([0, 3]))
    assert int(np.asarray(diverged.state.optimizer[1].count)[1]) < 3
    assert int(np.asarray(before.state.optimizer[1].count)[1]) == 3


def test_a_lane_that_has_its_own_learning_rate_moves_by_it(together):
    slower = with_learning_rate(RATES["llm"] / 10)
    assert slower.rows[1][-1]["update_norm"]["llm"] < 0.3 * together.rows[1][-1]["update_norm"]["llm"]
    np.testing.assert_equal(slower.rows[0], together.rows[0])


class TwoLinears(nn.Module):
    """The least model that an engine takes: it reads a batch of its own and returns logits [B, S, V]."""

    @nn.compact
    def __call__(self, batch):
        return Dense(6, name="head")(jnp.tanh(Dense(8, name="body")(batch["x"])))


class Numbers:
    """Batches of `TwoLinears`."""

    def __init__(self, lane):
        self.lane = lane

    def __getitem__(self, step):
        rng = np.random.default_rng((self.lane.seed, step))
        x = rng.normal(size=(2, 3, 4)).astype(np.float32)
        return {"x": x, "targets": x.argmax(-1).astype(np.int32), "target_weights": np.ones((2, 3), np.float32)}


def test_any_linen_model_compiles_once_whatever_the_ranks_seeds_rates_and_schedule(caplog):
    model, validation = TwoLinears(), jax.tree.map(lambda leaf: leaf[None], Numbers(Lane({}, 1, 99))[0])
    base = model.init(jax.random.key(0), Numbers(Lane({}, 1, 0))[0])["params"]
    engine = make_engine(
        model,
        lora.find_targets(base, {"vision": ["body"], "llm": ["head"]}),
        padded_ranks={"vision": 4, "llm": 4},
        alpha=lora.AlphaRule(),
        transform=optax.clip_by_global_norm(1.0),
        num_snapshots=2,
    )
    groups = [
        ([Lane({"vision": 4, "llm": 4}, 8, 0), Lane({"vision": 1, "llm": 2}, 8, 1)], 0.1, [0, 4, 9], "constant"),
        ([Lane({"vision": 2, "llm": 0}, 4, 2), Lane({"vision": 0, "llm": 3}, 8, 3)], 0.03, [0, 1, 2, 14], "cosine"),
    ]
    compiled = []
    for lanes, rate, looks, shape in groups:
        caplog.clear()
        with jax.log_compiles(), caplog.at_level(logging.WARNING):
            rates = {"vision": rate, "llm": rate / 2}
            timing = schedule(looks, multipliers=warmup_multipliers(looks[-1], 2, shape))
            result = run_group(lanes, engine, base, Numbers, validation, rates, timing)
        compiled.append([text for text in caplog.messages if "Compiling jit(" in text])
        assert all(rows[-1]["validation_loss"] < rows[0]["validation_loss"] for rows in result.rows)
    for name in ("jit(init)", "jit(train)", "jit(look)"):
        assert [sum(f"Compiling {name} " in text for text in texts) for texts in compiled] == [1, 0]
