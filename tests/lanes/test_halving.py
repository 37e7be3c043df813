"""The local sweep: which lanes go on at each rung. That its winner is the final run: test_pipeline.py."""

from dataclasses import replace

from mars_jax.lanes.eval_points import EvalPoint
from mars_jax.lanes.halving import halving_schedule, lane_steps
from mars_jax.lanes.stopping import Halving

RUNGS = halving_schedule(4, 8)  # 4 lanes to step 4, two of them to step 8


def points_of(*losses, alive=True):
    points = [EvalPoint(4 * i, loss) for i, loss in enumerate(losses)]
    return [*points[:-1], replace(points[-1], alive=alive)]


def test_the_worse_half_stops_at_a_rung():
    assert [tuple(rung) for rung in RUNGS] == [(4, 4, 2), (2, 8, 1)]
    assert lane_steps(RUNGS) == 4 * 4 + 2 * 4
    halving = Halving(rungs=RUNGS)
    assert halving.running([points_of(3.0)] * 4) == [0, 1, 2, 3]
    assert halving.running([points_of(3.0, 2.0), points_of(3.0, 1.0), points_of(3.0, 2.5), points_of(3.0, 1.5)]) == [
        1,
        3,
    ]


def test_a_lane_that_had_stopped_came_back_when_another_diverged_later():
    later = [points_of(3.0, 2.0), points_of(3.0, 1.0, 9.0, alive=False), points_of(3.0, 2.5), points_of(3.0, 1.5, 1.4)]
    assert Halving(rungs=RUNGS).running(later) == [3]


def test_a_lane_that_diverged_before_the_rung_leaves_its_place_to_another():
    now = [points_of(3.0, 2.0), points_of(3.0, 0.5, alive=False), points_of(3.0, 2.5), points_of(3.0, 1.5)]
    assert Halving(rungs=RUNGS).running(now) == [0, 3]
