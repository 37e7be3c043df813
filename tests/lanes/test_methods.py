"""Lanes of adapter methods other than LoRA: trained, stopped and gone on with, and what an engine refuses."""

import signal

import jax
import numpy as np
import pytest

from mars_jax.adapters.full_rank import FULL_RANK
from mars_jax.adapters.lora import LORA
from mars_jax.adapters.registry import METHODS
from mars_jax.adapters.tree import split_trainable
from mars_jax.errors import ConfigError, Interrupted
from mars_jax.lanes.inputs import LaneInputs
from mars_jax.lanes.lane import Lane
from mars_jax.lanes.losses import best_of, losses_of
from mars_jax.lanes.result import best_adapters
from mars_jax.lanes.step import mean_loss
from mars_jax.runtime.checkpoint import Checkpoints
from mars_jax.runtime.trees import flatten, subtree
from tests.helpers import least_model, toy_method
from tests.helpers.least_model import Numbers, TwoLinears
from tests.helpers.tiny_lanes import assert_same, schedule
from tests.helpers.toy_method import GAIN

LANES = [Lane({"vision": 1, "llm": 1}, 8, seed) for seed in (1, 2)]
FROZEN = Lane({"vision": 0, "llm": 1}, 8, 1)
RATES = {"vision": 0.3, "llm": 0.3}
TIMING = schedule([0, 4, 8, 16], per_doubling=1)
INPUTS = LaneInputs(least_model.base(), Numbers(0), {name: leaf[None] for name, leaf in Numbers(99)[0].items()}, RATES)


@pytest.fixture
def _registered(monkeypatch):
    """The toy method, as a user registers it."""
    monkeypatch.setattr(METHODS, "_members", dict(METHODS._members))
    METHODS.register(GAIN)


@pytest.fixture(scope="module")
def engine():
    return least_model.engine_of(FULL_RANK, 1)


@pytest.fixture(scope="module")
def full_rank(engine):
    """Two lanes that train both modules, and one that freezes one of them."""
    return least_model.run([*LANES, FROZEN], RATES, TIMING, engine)


class FromTheThirdChunk:
    """A signal that arrives during the third call."""

    chunks = 0

    @property
    def requested(self):
        self.chunks += 1
        return signal.SIGTERM if self.chunks >= 3 else None


def assert_same_curves(ours, theirs):
    points = ([[point.to_json() for point in lane] for lane in result.points] for result in (ours, theirs))
    np.testing.assert_equal(*points)


def stopped_and_gone_on_with(lanes, engine, directory):
    with Checkpoints(directory) as checkpoints:
        with pytest.raises(Interrupted):
            least_model.run(lanes, RATES, TIMING, engine, checkpoints=checkpoints, interrupts=FromTheThirdChunk())
        return least_model.run(lanes, RATES, TIMING, engine, checkpoints=checkpoints)


def test_a_full_rank_lane_learns_more_than_a_lora_lane_of_rank_1_that_moves_as_often(full_rank):
    lora = least_model.run(LANES, RATES, TIMING, least_model.engine_of(LORA, 1))
    for ours, theirs in zip(full_rank.points, lora.points, strict=False):
        assert ours[0].validation_loss == theirs[0].validation_loss
        assert ours[-1].validation_loss < theirs[-1].validation_loss < theirs[0].validation_loss


def test_a_full_rank_lane_that_was_stopped_ends_as_one_that_was_not(full_rank, engine, tmp_path):
    again = stopped_and_gone_on_with([*LANES, FROZEN], engine, tmp_path)
    assert_same_curves(again, full_rank)
    for k in range(3):
        assert_same(again.lane_state(k), full_rank.lane_state(k))


def test_a_full_rank_lane_that_freezes_a_module_moves_the_other_alone(full_rank, engine):
    assert full_rank.points[2][-1].update_norm["vision"] == 0.0
    assert full_rank.points[2][-1].update_norm["llm"] > 0.01
    adapters = best_adapters(engine, full_rank, 2, FROZEN)
    assert set(adapters) == {"head"}
    alone = least_model.run([FROZEN], RATES, TIMING, least_model.engine_of(FULL_RANK, 1))
    assert alone.points[0][-1].validation_loss == pytest.approx(full_rank.points[2][-1].validation_loss, rel=1e-6)


def test_norms_drift_and_losses_of_a_full_rank_lane_are_those_of_its_update(full_rank, engine):
    adapters = best_adapters(engine, full_rank, 0, LANES[0])
    assert jax.tree.map(np.shape, split_trainable(adapters, FULL_RANK)[0]) == {
        name: {"update": least_model.base()[name]["kernel"].shape} for name in ("body", "head")
    }
    loss = mean_loss(TwoLinears(), least_model.base(), adapters, Numbers(99)[0], FULL_RANK)
    best = min(row.validation_loss for row in full_rank.points[0])
    assert float(loss) == pytest.approx(best, rel=1e-6)
    # By the engine's own evaluation, which uses up the state.
    state = jax.tree.map(lambda leaf: leaf.copy(), full_rank.state)
    given = best_of(full_rank)
    losses = losses_of(given, engine, state, INPUTS, chunk_steps=TIMING.chunk_steps)
    assert losses == pytest.approx([min(row.validation_loss for row in rows) for rows in full_rank.points], rel=1e-6)
    norm = full_rank.points[0][-1].update_norm["llm"]
    state = full_rank.lane_state(0)
    last = engine.layout.adapters(state.trainable, state.fixed)
    assert norm == pytest.approx(float(np.linalg.norm(last["head"]["update"])), rel=1e-5)


@pytest.mark.usefixtures("_registered")
def test_a_method_from_outside_trains_is_evaluated_checkpointed_and_acts_between_steps(tmp_path):
    engine = least_model.engine_of(GAIN, 1)
    result = least_model.run(LANES, RATES, TIMING, engine)
    base = least_model.base()
    for k, (lane, rows) in enumerate(zip(LANES, result.points, strict=True)):
        assert rows[-1].validation_loss < rows[0].validation_loss
        state = result.lane_state(k)
        adapters = engine.layout.adapters(state.trainable, state.fixed)
        assert {float(leaf) for path, leaf in flatten(adapters).items() if path.endswith("/steps")} == {16.0}
        gains = [leaf for path, leaf in flatten(adapters).items() if path.endswith("/gain")]
        assert max(np.abs(leaf).max() for leaf in gains) == np.float32(toy_method.LARGEST)
        update = subtree(base, "head")["kernel"] * adapters["head"]["gain"][None, :]
        assert rows[-1].update_norm["llm"] == pytest.approx(float(np.linalg.norm(update)), rel=1e-5)
        best = best_adapters(engine, result, k, lane)
        loss = mean_loss(TwoLinears(), base, best, Numbers(99)[0], GAIN)
        assert float(loss) == pytest.approx(min(row.validation_loss for row in rows), rel=1e-6)
    again = stopped_and_gone_on_with(LANES, engine, tmp_path)
    assert_same_curves(again, result)
    assert_same(again.lane_state(1), result.lane_state(1))
    losses = losses_of(best_of(result), engine, result.state, INPUTS, chunk_steps=TIMING.chunk_steps)
    assert losses == pytest.approx([min(row.validation_loss for row in rows) for rows in result.points], rel=1e-6)


@pytest.mark.usefixtures("_registered")
def test_lanes_that_would_be_padded_are_refused_for_a_method_that_is_not_exact_then():
    engine = least_model.engine_of(GAIN, 1)
    with pytest.raises(ConfigError, match=r"'gain' trains otherwise when it is padded, and vision0-llm1-D8-s1 would"):
        least_model.run([LANES[0], FROZEN], RATES, TIMING, engine)


def test_an_engine_of_a_method_that_layers_cannot_find_is_refused():
    with pytest.raises(ConfigError, match="adapter method is 'gain'; allowed: lora, full_rank"):
        least_model.engine_of(GAIN, 1)
