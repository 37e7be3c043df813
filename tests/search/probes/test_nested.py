"""Nested data sizes: one single pass, read at each D, that is at D what a separate single pass over D would be."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mars_jax.config.load import load_config
from mars_jax.data.batches import nested_stream, subset
from mars_jax.errors import ConfigError
from mars_jax.lanes.eval_points import EvalPoint
from mars_jax.lanes.lane import Lane
from mars_jax.lanes.schedule import eval_steps
from mars_jax.laws.convergence.base import ConvergenceRule
from mars_jax.search.probes.design import planned_lanes, prefixes
from mars_jax.search.probes.records import lane_records
from tests.helpers import tiny_job, tiny_lanes
from tests.helpers.tiny_lanes import LANES, assert_same_points, schedule

BATCH = 2
SIZES = (8, 16, 32)


class Numbered:
    """Examples that are their own number."""

    def __getitem__(self, number):
        return {"number": np.int32(number)}


class Pictures:
    """The examples of `tiny_lanes`."""

    def __init__(self):
        self._pool = tiny_lanes.examples(SIZES[-1], seed=1)

    def __getitem__(self, number):
        return {name: leaf[number] for name, leaf in self._pool.items()}


# The order of the data.


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_the_first_samples_of_every_size_are_the_subset_of_that_size(batch_size, batches, doublings, seed):
    sizes = [batch_size * batches * 2**i for i in range(doublings)]
    indices = subset(1000, sizes[-1], seed % 100)
    stream = nested_stream(Numbered(), indices, sizes, seed=seed, batch_size=batch_size)
    assert len(stream) == sizes[-1] // batch_size  # a single pass
    seen = np.concatenate([stream[step]["number"] for step in range(len(stream))])
    for size in sizes:
        assert sorted(seen[:size]) == sorted(subset(1000, size, seed % 100))
        shorter = nested_stream(
            Numbered(), indices[:size], sizes[: sizes.index(size) + 1], seed=seed, batch_size=batch_size
        )
        np.testing.assert_array_equal(
            [shorter[i]["number"] for i in range(len(shorter))], seen[:size].reshape(-1, batch_size)
        )


def test_the_order_between_two_sizes_is_random_and_another_for_another_seed():
    indices = list(range(64))
    orders = []
    for seed in (0, 1):
        stream = nested_stream(Numbered(), indices, [32, 64], seed=seed, batch_size=4)
        orders.append(np.concatenate([stream[step]["number"] for step in range(16)]))
        assert not np.array_equal(orders[-1][:32], indices[:32])
        assert not np.array_equal(orders[-1][32:], indices[32:])
    assert not np.array_equal(*orders)


# Lanes.


def single_pass(sizes):
    """The lanes after one pass over the largest of these sizes."""
    steps = sizes[-1] // BATCH
    stream = nested_stream(Pictures(), range(sizes[-1]), sizes, seed=3, batch_size=BATCH)
    timing = schedule(eval_steps(steps, tiny_lanes.LOOKS_PER_DOUBLING), per_doubling=2)
    return tiny_lanes.run(LANES, tiny_lanes.padded_engine(), timing, stream=stream)


def test_a_lane_read_at_each_size_is_the_separate_single_pass_over_that_size_bit_for_bit():
    nested = single_pass(SIZES)
    assert [row.step for row in nested.points[0]] == [0, 4, 6, 8, 11, 16]
    for number, size in enumerate(SIZES):
        separate = single_pass(SIZES[: number + 1])
        for rows, nested_rows in zip(separate.points, nested.points, strict=True):
            read = [row for row in nested_rows if row.step <= size // BATCH]
            assert read[-1].step == size // BATCH
            assert_same_points(read, rows)


# The settings of a search.


def config(folder, *overrides):
    path = tiny_job.config(folder / "a.yaml", folder / "base", folder / "train.json", folder / "run")
    return load_config(path, ["probe.sampling=nested", "probe.steps=null", *overrides])


def test_a_search_plans_lanes_of_the_largest_size_and_reads_each_at_every_size(tmp_path):
    nested = config(tmp_path, "probe.num_samples=[16, 32, 64]")
    lanes = planned_lanes(nested)
    separate = planned_lanes(config(tmp_path, "probe.num_samples=[16, 32, 64]", "probe.sampling=separate"))
    assert {lane.num_samples for lane in lanes} == {64}
    reads = [read for lane in lanes for read in prefixes(nested, lane)]
    assert [steps for _, steps in reads[:3]] == [16, 8, 4]
    assert sorted(read.name for read, _ in reads) == sorted(lane.name for lane in separate)
    assert nested.probe.horizon == 16


def test_a_lane_that_diverges_late_is_sound_at_the_sizes_before(tmp_path):
    lane = Lane({"llm": 4}, 64, 0)
    losses = {0: 4.0, 4: 3.0, 8: 2.5, 11: np.nan}
    rows = [
        EvalPoint(
            step,
            loss,
            update_norm={"llm": float(step)},
            drift={"llm": 0.9},
            alive=bool(np.isfinite(loss)),
            reason=None if np.isfinite(loss) else "the loss was not finite between steps 8 and 11",
        )
        for step, loss in losses.items()
    ]
    reads = prefixes(config(tmp_path, "probe.num_samples=[16, 32, 64]"), lane)
    curves = [[row for row in rows if row.step <= steps] for _, steps in reads]
    records = lane_records([read for read, _ in reads], curves, ConvergenceRule("drift", 0.5, 1), {"llm": 1.0})
    assert [(r.num_samples, r.status, r.best_loss) for r in records] == [
        (64, "diverged", 2.5),
        (32, "horizon", 2.5),
        (16, "horizon", 3.0),
    ]


@pytest.mark.parametrize(
    ("override", "text"),
    [
        (
            "probe.num_samples=[16, 48, 64]",
            "from one pass over 64 samples, so each must be 64 halved any number of times",
        ),
        ("probe.num_samples=[16, 21]", "21 halved any number of times, and a multiple of batch_size 4; seen 16"),
        ("probe.num_samples=[18, 36]", "a multiple of batch_size 4; seen 18"),
        (
            "probe.num_samples=[8, 16, 32]",
            "at least 4 batches of 4 samples in each of num_samples, for the first eval point; seen 8",
        ),
    ],
)
def test_sizes_that_one_pass_cannot_be_read_at_are_refused(tmp_path, override, text):
    with pytest.raises(ConfigError) as error:
        config(tmp_path, override)
    assert text in str(error.value)


def test_warm_up_must_end_within_the_pass(tmp_path):
    with pytest.raises(ConfigError) as error:
        config(tmp_path, "probe.num_samples=[16, 32]", "optimizer.warmup_steps=9")
    assert "optimizer.warmup_steps (9) must be at most the 8 steps of a probe" in str(error.value)


# By the command.


def test_a_nested_search_records_every_lane_at_every_size(tmp_path):
    base, train = tiny_job.checkpoint(tmp_path / "base"), tiny_job.records(tmp_path / "data", 60)
    probe = {"sampling": "nested", "steps": None, "num_samples": [16, 32], "corners": False}
    rule = {"rule": "splice", "epsilon": 0.5, "sustain": 1}
    path = tiny_job.config(tmp_path / "a.yaml", base, train, tmp_path / "run", probe=probe, convergence=rule)
    done = tiny_job.mars("probe", path, "--json", cache=tmp_path / "cache")
    assert done.returncode == 0, done.stderr

    def lines(name):
        return [json.loads(line) for line in (tmp_path / "run" / name).read_text().splitlines()]

    records, curves = lines("probes/lanes.jsonl"), lines("probes/curves.jsonl")
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert (plan["lanes"], plan["runs"], plan["lane_steps"]) == (len(records), len(records) // 2, 8 * len(records) // 2)
    small, large = ([record["lane"] for record in records if record["num_samples"] == size] for size in (16, 32))
    assert len(small) == len(large) == plan["runs"] > 0
    for record in records:
        assert record["steps"] == record["num_samples"] // 4
        assert record["lane"].endswith(f"-D{record['num_samples']}-s0")
    # What remained is measured from the best eval point up to each size.
    own = dict.fromkeys(("lane", "remaining", "interaction", "hybrids"))
    rows = {name: [{**row, **own} for row in curves if row["lane"] == name] for name in (*small, *large)}
    for record in records:
        at_best = [
            row["remaining"]
            for row in curves
            if (row["lane"], row["step"]) == (record["lane"], record["best_step"]) and record["best_step"]
        ]
        assert all(set(shares.values()) == {0.0} for shares in at_best)
    for name in small:
        longer = rows[name.replace("D16", "D32")]
        assert [row["step"] for row in longer] == [0, 4, 6, 8]
        assert rows[name] == longer[:2]
    groups = [event for event in lines("events.jsonl") if event["event"] == "group"]
    # Steps count once, however often they are read.
    assert sum(group["useful_lane_steps"] for group in groups) == plan["lane_steps"]
