"""Paired race: which lanes stop at a rung, and that it is decided by samples and by how much standings still change."""

from dataclasses import replace

import numpy as np
import pytest

from mars_jax.lanes.eval_points import EvalPoint
from mars_jax.lanes.race import PairedRace, paired_error
from mars_jax.lanes.stopping import replay

HORIZON = 64
STEPS = (0, 4, 8, 16, 24, 32, 40, 48, 56, 64)
SAMPLES = np.random.default_rng(0).exponential(1.0, 200)


def curve(end, trend=0.0, noise=0.0, seed=0, alive_until=HORIZON):
    """Losses that fall to `end`; log losses at earlier steps lie `trend` higher for each halving of the step."""
    points = []
    for step in STEPS:
        loss = 3.0 if step == 0 else end * (HORIZON / step) ** trend * (HORIZON / step) ** 0.2
        alive = step <= alive_until
        errors = noise * np.random.default_rng((seed, step)).normal(size=len(SAMPLES))
        samples = SAMPLES / SAMPLES.mean() * loss + errors - errors.mean()
        points.append(EvalPoint(step, loss if alive else np.inf, alive=alive, sample_losses=tuple(samples.tolist())))
        if not alive:
            break
    return points


def ends(curves, **settings):
    return [points[-1].step for points in replay(curves, PairedRace(HORIZON, **settings))]


def test_lanes_that_are_far_behind_stop_at_the_first_rung_and_the_leader_runs_to_the_end():
    assert ends([curve(1.0), curve(1.5), curve(2.0)]) == [64, 16, 16]


def test_a_lane_that_can_win_by_less_than_the_margin_stops():
    level = [curve(1.0, noise=0.1, seed=1), curve(1.001, noise=0.1, seed=2)]
    error = paired_error(level[0][-1].sample_losses, level[1][-1].sample_losses)
    assert 0.005 < error < 0.02
    assert ends(level, margin=0.001) == [64, 64]
    assert ends(level, margin=0.1) == [64, 16]


def test_a_difference_that_the_samples_show_only_when_they_are_paired_is_seen():
    # Losses of samples scatter by 100 %, so means of 200 differ by 10 %; every sample of one lane is 1 % worse.
    behind = [curve(1.0), curve(1.01)]
    assert ends(behind) == [64, 16]


def test_standings_that_change_keep_a_lane_that_is_behind():
    catching_up = curve(1.0, trend=0.05)
    steady = curve(1.02)
    other = curve(1.3, trend=-0.1)
    at_first = [points[3].validation_loss for points in (catching_up, steady, other)]
    assert at_first[0] > 1.04 * at_first[1]
    assert ends([catching_up, steady, other], chance=0.1)[0] == 64


def test_a_lane_that_diverged_never_comes_back_and_does_not_lead():
    dead = curve(0.5, alive_until=4)
    assert ends([dead, curve(1.0), curve(1.6)]) == [8, 64, 16]
    assert ends([dead, dead]) == [8, 8]


def test_decisions_of_a_resumed_race_are_those_of_the_whole_one():
    curves = [curve(1.0, 0.05, 0.1, 1), curve(1.02, 0.0, 0.1, 2), curve(1.3, 0.0, 0.1, 3), curve(1.01, 0.1, 0.1, 4)]
    rule = PairedRace(HORIZON)
    seen = replay(curves, rule)
    for step in STEPS[2:]:
        some = [[point for point in points if point.step <= step] for points in seen]
        goes_on = rule.running(some)
        assert goes_on == [
            k for k, points in enumerate(seen) if points[-1].step > step or (step == points[-1].step == HORIZON)
        ]


def test_rungs_and_half_of_the_first_ones_steps_are_eval_points():
    assert PairedRace(320).eval_steps == (40, 80, 120, 160, 200, 240, 280)
    assert PairedRace(2).eval_steps == (1, 2)
    assert PairedRace(1).running([curve(1.0)[:1]]) == [0]


def test_a_loss_of_nothing_ended_in_a_traceback():
    perfect = [replace(point, validation_loss=0.0) for point in curve(1.0)]
    assert ends([perfect, curve(1.0)])[0] == 64


def test_lanes_stop_that_cannot_beat_a_run_that_has_ended():
    ended = tuple(curve(1.0))
    assert ends([curve(1.2), curve(1.3)], against=ended) == [16, 16]
    assert ends([curve(0.9), curve(1.3)], against=ended) == [64, 16]
    assert ends([curve(1.2), curve(1.3)]) == [64, 16]


def test_a_rung_that_is_no_eval_point_of_any_lane_decides_nothing():
    sparse = [[p for p in curve(end) if p.step not in PairedRace(HORIZON).rungs[:-1]] for end in (1.0, 1.5)]
    assert [points[-1].step for points in replay(sparse, PairedRace(HORIZON))] == [64, 56]


@pytest.mark.parametrize("settings", [{}, {"margin": 0.0, "chance": 0.2}])
def test_one_lane_runs_to_the_end(settings):
    assert ends([curve(1.0)], **settings) == [64]
