"""The splice: what remains for each module, the rule that reads it, hybrids run by the engine, its file."""

import math
import signal
from functools import partial
from itertools import combinations

import jax
import numpy as np
import pytest

from mars_jax.adapters.vector import Fixed
from mars_jax.errors import DataError, Interrupted
from mars_jax.lanes.eval_points import ModuleSwaps
from mars_jax.lanes.inputs import LaneInputs
from mars_jax.lanes.lane import Lane
from mars_jax.lanes.losses import losses_of
from mars_jax.lanes.schedule import Schedule, eval_steps
from mars_jax.lanes.snapshots import Snapshots
from mars_jax.lanes.step import mean_loss
from mars_jax.laws.convergence.base import ConvergenceRule, converge
from mars_jax.runtime.checkpoint import Checkpoints
from mars_jax.runtime.trees import flatten, unflatten
from mars_jax.search.probes.swaps import Prefix, count_swaps, module_swaps, swap_groups, swapped, what_remains
from tests.helpers import least_model
from tests.helpers.least_model import Numbers, TwoLinears
from tests.helpers.tiny_lanes import schedule

RULE = ConvergenceRule("splice", 0.1, 3)
STEPS = np.concatenate([[0], np.geomspace(4, 1024, 33)])
LOOKS = eval_steps(16, 2)
LANES = [
    Lane({"vision": 4, "llm": 2}, 8, 1),
    Lane({"vision": 1, "llm": 4}, 8, 1),
    Lane({"vision": 0, "llm": 3}, 8, 1),
]
RATES = {"vision": 0.3, "llm": 0.1}
VALIDATION = {name: leaf[None] for name, leaf in Numbers(99)[0].items()}


def subsets(modules):
    return [frozenset(some) for number in range(len(modules) + 1) for some in combinations(modules, number)]


# What remains.


def test_what_remains_for_a_module_is_what_putting_it_back_costs_the_best_adapters():
    worth = {"vision": 0.5, "projector": 0.1, "llm": 2.0}
    losses = {some: 1.0 + sum(worth[m] for m in worth if m not in some) for some in [*subsets(worth)]}
    read = {some: losses[some] for some in (frozenset(), *swapped(list(worth)), frozenset(worth))}
    found = what_remains(read)
    assert found.remaining == pytest.approx(worth)
    assert found.interaction == pytest.approx(0.0, abs=1e-12)


def test_modules_that_only_work_together_have_each_the_whole_to_lose():
    losses = {some: 1.0 if len(some) == 2 else 3.0 for some in subsets(["vision", "llm"])}
    found = what_remains(losses)
    assert found.remaining == {"vision": 2.0, "llm": 2.0}
    # L(t,T) + L(T,t) - L(t,t) - L(T,T)
    assert found.interaction == 3.0 + 3.0 - 3.0 - 1.0


def test_a_module_that_trains_alone_has_all_that_the_lane_has():
    found = what_remains({frozenset(): 3.0, frozenset({"llm"}): 1.0})
    assert (found.remaining, found.interaction) == ({"llm": 2.0}, 0.0)


def test_what_a_module_does_among_modules_that_have_not_learned_was_taken_for_its_own():
    # The encoder alone takes 5 nats off a language model that doesn't know the words, and 0.1 off one that does.
    losses = dict(zip(subsets(["vision", "llm"]), (8.0, 3.0, 0.6, 0.5), strict=True))
    assert what_remains(losses).remaining["vision"] == pytest.approx(0.1)


# The rule.


def falls(*taus, first=1.0):
    """What remains, [1, M, N], falling exponentially to the last look, which is the best."""
    curves = np.exp(-STEPS / np.asarray(taus)[:, None])
    return first * ((curves - curves[:, -1:]) / (1 - curves[:, -1:]))[None]


def test_each_module_has_its_own_time():
    found = converge(RULE, STEPS, falls(20.0, 100.0))
    np.testing.assert_allclose(found.steps[0], np.log(10) * np.array([20.0, 100.0]), rtol=0.02)
    assert not np.any(found.censored)


def test_times_do_not_depend_on_the_size_of_the_shares():
    np.testing.assert_allclose(
        converge(RULE, STEPS, falls(20.0, 100.0)).steps, converge(RULE, STEPS, falls(20.0, 100.0, first=7.0)).steps
    )


def test_only_the_module_that_still_learns_at_the_horizon_is_censored():
    found = converge(RULE, STEPS, falls(20.0, 600.0))
    np.testing.assert_array_equal(found.censored, [[False, True]])
    assert float(found.steps[0, 1]) == 1024.0


def test_looks_after_the_best_one_are_not_read_but_count_as_time_that_passed():
    curves = falls(20.0, 30.0)
    curves[:, :, 28:] = np.nan
    found = converge(RULE, STEPS, curves)
    assert not np.any(found.censored)
    np.testing.assert_allclose(found.steps[0], np.log(10) * np.array([20.0, 30.0]), rtol=0.03)


def test_a_share_that_rises_again_has_not_converged_before():
    curves = falls(20.0, 20.0)
    curves[0, 1, 20] = 0.3
    found = converge(RULE, STEPS, curves)
    assert float(found.steps[0, 0]) < 50.0
    assert STEPS[20] < float(found.steps[0, 1]) < STEPS[21]


def test_a_module_without_a_part_in_the_loss_is_undefined_not_quick():
    curves = np.concatenate([falls(50.0), 0.009 * falls(50.0), -0.2 * falls(50.0)], axis=1)
    found = converge(RULE, STEPS, curves)
    np.testing.assert_array_equal(np.isfinite(found.steps), [[True, False, False]])
    assert not np.any(found.censored)


def test_a_lane_without_anything_to_split_is_undefined():
    found = converge(RULE, STEPS, np.full((1, 2, STEPS.size), np.nan))
    assert np.all(np.isnan(found.steps))
    assert not np.any(found.censored)


# Hybrids by the engine.


def spliced(snapshots, timing: Schedule, rates=RATES, **changes):
    """Rows of the lanes and what remained at them."""
    engine = least_model.engine()
    result = least_model.run(LANES, rates, timing, snapshots=snapshots, **changes)
    readings = [
        Prefix(k, swap_groups(lane.adapted, RATES), rows)
        for k, (lane, rows) in enumerate(zip(LANES, result.points, strict=True))
    ]
    read = partial(
        losses_of,
        engine=engine,
        state=result.state,
        inputs=LaneInputs(least_model.base(), Numbers(0), VALIDATION, rates),
        chunk_steps=timing.chunk_steps,
    )
    seen = []

    def counted(adapters):
        seen.extend(losses := read(adapters))
        return losses

    found = module_swaps(engine, result, snapshots, readings, counted)
    assert len(seen) == count_swaps(readings)
    return result.points, found


@pytest.fixture
def snapshots(tmp_path):
    with Snapshots(tmp_path / "adapters", LOOKS, len(LANES), least_model.engine().layout.size) as opened:
        yield opened


def test_what_remains_is_that_of_adapters_mixed_by_hand(snapshots):
    rows, found = spliced(snapshots, schedule(LOOKS))
    layout = least_model.engine().layout
    loss = jax.jit(lambda adapters: mean_loss(TwoLinears(), least_model.base(), adapters, Numbers(99)[0]))
    lane, look = LANES[0], 2
    best = min(range(len(LOOKS)), key=lambda i: rows[0][i].validation_loss)
    assert best > look

    def adapters(step):
        tree = layout.adapters(snapshots.read(step, 0), Fixed({module: {"scale": 2.0} for module in RATES}, {}))
        return flatten(tree)

    early, late = adapters(LOOKS[look]), adapters(LOOKS[best])
    losses = {
        some: float(
            loss(
                unflatten(
                    {
                        path: (late if layout.targets[path.rpartition("/")[0]].module in some else early)[path]
                        for path in early
                    }
                )
            )
        )
        for some in subsets(lane.adapted)
    }
    assert losses[frozenset()] == pytest.approx(rows[0][look].validation_loss, abs=1e-5)
    assert set(found[0][look].losses) == {"", "vision", "llm", "llm+vision"}
    expected = what_remains(losses)
    assert found[0][look].remaining == pytest.approx(expected.remaining, abs=2e-5)
    assert found[0][look].interaction == pytest.approx(expected.interaction, abs=2e-5)
    assert len({round(nats, 4) for nats in expected.remaining.values()}) == 2
    assert abs(expected.interaction) > 1e-4


def test_what_remains_and_the_interaction_add_up_and_end_at_zero(snapshots):
    rows, found = spliced(snapshots, schedule(LOOKS))
    for lane, lane_rows, remaining in zip(LANES, rows, found, strict=True):
        losses = [row.validation_loss for row in lane_rows]
        best = int(np.argmin(losses))
        assert [left == ModuleSwaps() for left in remaining] == [i > best for i in range(len(losses))]
        for loss, left in zip(losses[: best + 1], remaining, strict=False):
            assert sorted(left.remaining) == sorted(lane.adapted)
            assert sum(left.remaining.values()) - left.interaction == pytest.approx(loss - losses[best], abs=1e-6)
        assert set(remaining[best].remaining.values()) == {0.0}


def test_there_is_a_hybrid_for_each_of_two_or_more_modules():
    assert [len(swapped("abcd"[:count])) for count in (1, 2, 3, 4)] == [0, 2, 3, 4]


def test_modules_that_are_not_searched_are_switched_with_the_first_that_is():
    every = ["vision", "projector", "llm"]
    assert swap_groups(every, ["vision", "llm"]) == {"vision": ["vision", "projector"], "llm": ["llm"]}
    assert swap_groups(every, ["llm"]) == {"llm": ["llm", "vision", "projector"]}
    assert swap_groups(["projector", "llm"], ["vision", "llm"]) == {"llm": ["llm", "projector"]}
    assert swap_groups(["projector"], ["vision", "llm"]) == {"projector": ["projector"]}
    assert swap_groups(every, every) == {module: [module] for module in every}


def test_a_lane_that_diverged_has_nothing_to_split(snapshots):
    _, found = spliced(snapshots, schedule(LOOKS), rates=dict.fromkeys(RATES, math.nan))
    assert all(left == ModuleSwaps() for remaining in found for left in remaining)


def test_a_group_that_was_stopped_splices_as_one_that_was_not(snapshots, tmp_path):
    _, found = spliced(snapshots, schedule(LOOKS))

    class FromTheFifthChunk:
        chunks = 0

        @property
        def requested(self):
            self.chunks += 1
            return signal.SIGTERM if self.chunks >= 5 else None

    with Snapshots(tmp_path / "stopped", LOOKS, len(LANES), snapshots._size) as again:
        with Checkpoints(tmp_path / "checkpoints") as checkpoints:
            with pytest.raises(Interrupted):
                spliced(again, schedule(LOOKS), checkpoints=checkpoints, interrupts=FromTheFifthChunk())
            assert spliced(again, schedule(LOOKS), checkpoints=checkpoints)[1] == found
        assert again.path.read_bytes() == snapshots.path.read_bytes()


def test_adapters_that_were_lost_are_said_not_taken_for_zeros(snapshots, tmp_path):
    snapshots.write(LOOKS[1], 0, np.ones(snapshots._size))
    snapshots.write(LOOKS[1], 2, np.ones(snapshots._size))
    with pytest.raises(DataError, match=f"{snapshots.path} doesn't hold the adapters of lane 1 at step {LOOKS[1]}.*"):
        snapshots.read(LOOKS[1], 1)
    with pytest.raises(DataError, match=f"Delete {tmp_path} and run the same command again"):
        snapshots.read(LOOKS[-1], 3)
    np.testing.assert_array_equal(snapshots.read(LOOKS[1], 2), np.ones(snapshots._size))
