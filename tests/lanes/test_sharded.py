"""Lanes and base over devices: the numbers of one device, no talk between lanes, and checkpoints that change meshes."""

import dataclasses
import re
import signal

import numpy as np
import pytest

from mars_jax.errors import Interrupted
from mars_jax.lanes.lane import Lane
from mars_jax.models.shardings import base_shardings
from mars_jax.runtime.checkpoint import Checkpoints
from mars_jax.runtime.interrupts import Interrupts
from mars_jax.runtime.sharding import place
from tests.helpers import tiny_lanes
from tests.helpers.tiny_lanes import Program, schedule

GRID = [Lane({"vision": v, "projector": p, "llm": n}, 8, 1) for v in (1, 2, 3, 4) for p in (0, 2) for n in (2, 4)]
TIMING = schedule([0, 3, 8])
COLLECTIVES = r"(?:all-gather|all-reduce|all-to-all|reduce-scatter|collective-\w+)(?:-start)?\("


def engine_on(mesh_sizes, num_slots):
    engine = tiny_lanes.engine(tiny_lanes.PADDED, num_slots, lane_block=2, mesh_sizes=mesh_sizes)
    return dataclasses.replace(engine, chunk=Program(engine.chunk))


@pytest.fixture(scope="module")
def eight_devices():
    return engine_on({"lane": 8}, 16)


@pytest.fixture(scope="module")
def grid():
    """Rows and state of every lane, four at a time on one device."""
    groups = [tiny_lanes.run(GRID[i : i + 4], tiny_lanes.padded_engine(), TIMING) for i in range(0, 16, 4)]
    return [(group.points[k], group.lane_state(k)) for group in groups for k in range(4)]


def assert_close(result, grid, tolerance):
    for k, rows in enumerate(result.points):
        expected_rows, expected = grid[k]
        for row, other in zip(rows, expected_rows, strict=True):
            for name in ("validation_loss", "train_loss", "update_norm"):
                if getattr(other, name) is not None:
                    assert getattr(row, name) == pytest.approx(getattr(other, name), rel=tolerance, abs=tolerance), (
                        k,
                        name,
                    )
        state = result.lane_state(k)
        np.testing.assert_allclose(state.trainable, expected.trainable, rtol=0, atol=tolerance)
        np.testing.assert_allclose(state.best, expected.best, rtol=0, atol=tolerance)
        assert state.best_step == expected.best_step == 8


def test_lanes_over_eight_devices_equal_those_on_one(grid, eight_devices):
    result = tiny_lanes.run(GRID, eight_devices, TIMING)
    assert result.slots[:9] == [0, 2, 4, 6, 8, 10, 12, 14, 1]
    assert {shard.data.shape[0] for shard in result.state.trainable.addressable_shards} == {2}
    assert len(result.state.trainable.sharding.device_set) == 8
    assert_close(result, grid, 1e-6)
    assert (result.useful_steps, result.executed_steps) == (16 * 8, 16 * 8)


def test_lanes_on_different_devices_do_not_talk_to_each_other(eight_devices):
    tiny_lanes.run(GRID, eight_devices, schedule([0, 3]))
    text = eight_devices.chunk.compiled.as_text()
    assert "num_partitions=8" in text
    assert not re.findall(COLLECTIVES, text)


def test_fewer_lanes_than_slots_are_spread_over_the_devices(grid, eight_devices):
    result = tiny_lanes.run(GRID[:9], eight_devices, TIMING)
    assert_close(result, grid, 1e-6)
    # Every device goes at the pace of the one with two lanes.
    assert (result.useful_steps, result.executed_steps) == (9 * 8, 16 * 8)


def stop_at_step_3(lanes, engine, directory):
    """Runs until a signal asks to stop."""
    interrupts = Interrupts()

    def advance(progress):
        if progress.step == 3:
            interrupts.requested = signal.SIGTERM

    with Checkpoints(directory) as checkpoints, pytest.raises(Interrupted, match="a checkpoint of step 3 was saved"):
        tiny_lanes.run(lanes, engine, TIMING, checkpoints=checkpoints, interrupts=interrupts, advance=advance)


def go_on(lanes, engine, directory, **changes):
    told = []
    with Checkpoints(directory, pytest.fail) as checkpoints:
        result = tiny_lanes.run(lanes, engine, TIMING, checkpoints=checkpoints, advance=told.append, **changes)
    assert told[0].step == 3
    return result


def test_a_checkpoint_of_eight_devices_goes_on_on_one_and_the_other_way_round(grid, eight_devices, tmp_path):
    # Lanes have other slots on another mesh, and there may be more slots: lanes once took the states of others.
    one_device = tiny_lanes.padded_engine()
    for lanes in (GRID[:4], GRID[:3]):
        for name, first, second in (("there", eight_devices, one_device), ("back", one_device, eight_devices)):
            directory = tmp_path / f"{name}{len(lanes)}"
            stop_at_step_3(lanes, first, directory)
            assert_close(go_on(lanes, second, directory), grid, 1e-6)


def test_a_base_split_over_fsdp_and_tensor_beside_lanes_equals_a_whole_one(grid, eight_devices, tmp_path):
    engine = engine_on({"lane": 2, "fsdp": 2, "tensor": 2}, 4)
    base = place(tiny_lanes.base(), base_shardings(tiny_lanes.CONFIG, engine.mesh))
    kernel = base["llm"]["layers"]["mlp"]["up_proj"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size / 4
    # One lane leaves a lane device without work, and the other one must not wait for it.
    for number in (4, 1):
        assert_close(tiny_lanes.run(GRID[:number], engine, TIMING, base=base), grid, 1e-5)
    assert re.findall(COLLECTIVES, engine.chunk.compiled.as_text())
    stop_at_step_3(GRID[:3], eight_devices, tmp_path)
    assert_close(go_on(GRID[:3], engine, tmp_path, base=base), grid, 1e-5)
