"""A final run that begins from the probe with the picked ranks, and what happens where there is none."""

import numpy as np
import tiny_lanes
from tiny_lanes import LANES, schedule


def test_lanes_begin_from_the_adapters_that_they_are_given():
    engine = tiny_lanes.padded_engine()
    first = tiny_lanes.run(LANES[:1], engine, schedule([0, 8]))
    initial = first.lane_state(0).trainable
    again = tiny_lanes.run(LANES[:1], engine, schedule([0, 4]), initial=initial)
    assert again.rows[0][0]["validation_loss"] == first.rows[0][-1]["validation_loss"]
    np.testing.assert_array_equal(again.lane_state(0).snapshots.shape, first.lane_state(0).snapshots.shape)
