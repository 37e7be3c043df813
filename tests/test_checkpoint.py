"""Checkpoints that a kill, a bad disk or a full one left: what can't be read is passed over, and said."""

import numpy as np
import pytest
import tiny_lanes
from tiny_lanes import LANES, assert_same, schedule

from mars_jax.checkpoint import Checkpoints

TIMING = schedule([0, 4, 6, 8, 11, 16], looks_per_doubling=tiny_lanes.LOOKS_PER_DOUBLING)


def run(**changes):
    return tiny_lanes.run(LANES, tiny_lanes.padded_engine(), TIMING, **changes)


@pytest.fixture(scope="module")
def uninterrupted():
    return run()


class Kill(Exception):
    """What stops a run."""


def stop_at(step, directory):
    """Runs until a step is told, and is killed there; leaves the checkpoints of the two chunks before."""

    def advance(progress):
        if progress.step >= step:
            raise Kill

    with Checkpoints(directory) as checkpoints, pytest.raises(Kill):
        run(checkpoints=checkpoints, advance=advance)


def test_a_run_goes_on_from_its_newest_checkpoint(uninterrupted, tmp_path):
    stop_at(11, tmp_path)
    told = []
    with Checkpoints(tmp_path, pytest.fail) as checkpoints:
        resumed = run(checkpoints=checkpoints, advance=told.append)
    assert told[0].step == 8
    np.testing.assert_equal(resumed.rows, uninterrupted.rows)
    assert_same(resumed.state, uninterrupted.state)
