"""Which lanes share a program and a group; and the cached encoder, whose lanes learn what those that see pixels do."""

from functools import partial
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mars_jax.adapters import lora
from mars_jax.config.load import load_config
from mars_jax.data.features import FeatureSource
from mars_jax.job.programs import lane_groups, probe_programs
from mars_jax.job.workspace import Workspace
from mars_jax.lanes.buckets import plan_buckets
from mars_jax.lanes.lane import Lane
from mars_jax.lanes.step import mean_loss
from mars_jax.runtime.progress import ConsoleReporter
from mars_jax.runtime.trees import flatten
from mars_jax.search.probes.design import planned_lanes
from tests.helpers import tiny_job


def lane(vision, llm, num_samples=8, seed=0):
    return Lane({"vision": vision, "llm": llm}, num_samples, seed)


def flops(ranks, cached):
    """The encoder costs 100 and half of that again for its backward pass, a rank 1."""
    encoder = 0 if cached else 100 + 50 * (ranks["vision"] > 0)
    return 100 + encoder + sum(ranks.values())


def told(buckets):
    """Names, padded ranks and cache of every bucket."""
    return [([lane.name for lane in b.lanes], tuple(b.padded_ranks.values()), b.cached_encoder) for b in buckets]


def names(*lanes):
    return [lane.name for lane in lanes]


# By cost.


def test_lanes_of_the_same_ranks_share_a_bucket_whatever_a_compile_costs():
    lanes = [lane(2, 4, d, s) for d in (8, 16) for s in (0, 1)]
    assert told(plan_buckets(lanes, flops, 0.0, cacheable=True)) == [(names(*lanes), (2, 4), False)]


def test_buckets_merge_while_a_compile_costs_more_than_the_padding():
    low, high = [lane(2, 4, seed=s) for s in range(3)], lane(8, 8)
    # Merged, three lanes would be padded by 10 each.
    apart = [(names(*low), (2, 4), False), (names(high), (8, 8), False)]
    assert told(plan_buckets([*low, high], flops, 30.0, cacheable=False)) == apart
    together = [(names(*low, high), (8, 8), False)]
    assert told(plan_buckets([*low, high], flops, 30.1, cacheable=False)) == together


def test_lanes_without_an_encoder_adapter_are_kept_apart_where_the_cache_pays():
    frozen, adapted = lane(0, 4), lane(4, 4)
    # The cache saves the lane 150 of 254 FLOPs, and padding 4 more.
    assert told(plan_buckets([adapted, frozen], flops, 153.0, cacheable=True)) == [
        (names(adapted), (4, 4), False),
        (names(frozen), (0, 4), True),
    ]
    assert told(plan_buckets([adapted, frozen], flops, 155.0, cacheable=True)) == [
        (names(adapted, frozen), (4, 4), False)
    ]
    # Without a cache only the backward pass is saved.
    assert told(plan_buckets([adapted, frozen], flops, 60.0, cacheable=False)) == [
        (names(adapted, frozen), (4, 4), False)
    ]


def test_a_base_without_a_vision_module_in_the_search_may_be_cached():
    lanes = [Lane({"llm": 2}, 8, 0), Lane({"llm": 4}, 8, 0)]
    (bucket,) = plan_buckets(lanes, lambda ranks, cached: 1.0, 10.0, cacheable=True)
    assert bucket.cached_encoder


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, 2)), min_size=1, max_size=10, unique=True),
    st.floats(0.0, 1000.0),
    st.booleans(),
)
def test_every_lane_is_in_one_bucket_that_covers_it_and_none_costs_more_than_all_apart(cells, compile_flops, cacheable):
    lanes = [lane(vision, llm, seed=seed) for vision, llm, seed in cells]
    buckets = plan_buckets(lanes, flops, compile_flops, cacheable=cacheable)
    place = {lane.name: i for i, lane in enumerate(lanes)}
    order = [place[lane.name] for bucket in buckets for lane in bucket.lanes]
    assert sorted(order) == list(range(len(lanes)))
    for bucket in buckets:
        places = [place[lane.name] for lane in bucket.lanes]
        assert places == sorted(places)
        assert bucket.padded_ranks == {m: max(lane.ranks[m] for lane in bucket.lanes) for m in ("vision", "llm")}
        assert bucket.cached_encoder == (cacheable and bucket.padded_ranks["vision"] == 0)

    def cost(buckets):
        return sum(len(b.lanes) * flops(b.padded_ranks, b.cached_encoder) + compile_flops for b in buckets)

    apart = plan_buckets(lanes, flops, 0.0, cacheable=cacheable)
    assert cost(buckets) <= cost(apart) + 1e-6


def test_the_lanes_of_a_group_share_their_data_and_groups_are_as_equal_as_can_be():
    lanes = [lane(v, n, d, s) for d in (16, 8) for s in (0, 1) for v in range(7) for n in (1,)]
    groups = lane_groups(lanes, most=3)
    assert [len(group) for group in groups] == [3, 3, 1] * 4
    assert [lane for group in groups for lane in group] == lanes
    assert all(len({(lane.num_samples, lane.seed) for lane in group}) == 1 for group in groups)
    assert [len(group) for group in lane_groups(lanes[:7], most=4)] == [4, 3]
    assert [len(group) for group in lane_groups(lanes[:7], most=7)] == [7]


# On a job.


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("job")
    base, train = tiny_job.checkpoint(folder / "base"), tiny_job.records(folder / "data", 60)
    rule = {"rule": "loss_fraction", "epsilon": None}
    config = load_config(tiny_job.config(folder / "a.yaml", base, train, folder / "run", convergence=rule))
    return Workspace(config, ConsoleReporter())


def test_the_programs_of_a_job_hold_every_lane_once_in_slots_enough(workspace):
    lanes = planned_lanes(workspace.config)
    programs = probe_programs(workspace, lanes, 2)
    grouped = [lane for program in programs for group in program.groups for lane in group]
    assert sorted(lane.name for lane in grouped) == sorted(lane.name for lane in lanes)
    for program in programs:
        assert program.engine.num_slots % program.engine.lane_devices == 0
        assert max(map(len, program.groups)) <= program.engine.num_slots
        assert program.engine.cached_encoder == program.bucket.cached_encoder
        assert program.engine.layout.ranks == program.bucket.padded_ranks
        assert all(len(group) <= workspace.config.probe.lanes_per_program for group in program.groups)


@pytest.mark.parametrize(
    ("sizes", "number"),
    # Of eight; a program of this job has six lanes at most.
    [({}, 6), ({"lane": 1}, 1), ({"lane": 2, "data": 2}, 4), ({"data": 2}, 8), ({"lane": 4, "tensor": -1}, 8)],
)
def test_of_a_cpus_cores_as_many_are_used_as_the_config_asks_for(workspace, sizes, number):
    config = workspace.config.model_copy(update={"mesh": workspace.config.mesh.model_copy(update=sizes)})
    mesh = Workspace(config, ConsoleReporter()).mesh
    assert mesh.size == number
    assert all(mesh.shape[axis] == size for axis, size in sizes.items() if size > 0)


QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
LLM_ONLY = Lane({"vision": 0, "projector": 0, "llm": 4}, 16, 1)


def test_cached_features_give_the_losses_and_gradients_of_pixels(workspace):
    pixels, features = (workspace.probe_stream(LLM_ONLY, cached_encoder=cached) for cached in (False, True))
    adapters = lora.init_adapters(jax.random.key(1), workspace.targets, LLM_ONLY.ranks, padded_ranks=LLM_ONLY.ranks)
    rng = np.random.default_rng(0)
    adapters = jax.tree.map(lambda leaf: rng.normal(0.0, 0.3, leaf.shape).astype(np.float32), adapters)
    trainable, scales = lora.split_trainable(adapters)
    base = jax.device_get(workspace.base)

    @partial(jax.jit, compiler_options=QUICK)
    def step(trainable, batch):
        def loss(trainable):
            return mean_loss(workspace.model, base, lora.join_trainable(trainable, scales), batch)

        return jax.value_and_grad(loss)(trainable)

    losses = []
    for number in range(5):  # more than an epoch
        shown, cached = dict(pixels[number]), dict(features[number])
        expected, slopes = step(trainable, shown)
        value, gradients = step(trainable, cached)
        np.testing.assert_allclose(value, expected, rtol=1e-6)
        for path, slope in flatten(slopes).items():
            largest = np.abs(slope).max()
            assert largest > 0
            found = flatten(gradients)[path]
            np.testing.assert_allclose(found, slope, rtol=1e-5, atol=1e-6 * largest, err_msg=path)
        assert shown.pop("pixels").shape[0] == cached.pop("features").shape[0]
        jax.tree.map(np.testing.assert_array_equal, cached, shown)
        losses.append(float(value))
    assert len(set(losses)) == 5


def test_the_pixels_of_the_validation_went_along_with_their_features(workspace):
    pixels, features = (workspace.validation_batches(4, cached_encoder=cached) for cached in (False, True))
    encode = jax.jit(lambda x: workspace.model.apply({"params": jax.device_get(workspace.base)}, x, method="encode"))
    np.testing.assert_allclose(features["features"][0], encode({"pixels": pixels["pixels"][0]}), rtol=1e-5, atol=1e-5)
    assert features.keys() - {"features"} == pixels.keys() - {"pixels"}
    assert "pixels" not in features


def test_every_picture_is_encoded_once():
    class Source:
        """Eight records of three pictures."""

        records = tuple(SimpleNamespace(digests=("abc"[i % 3],)) for i in range(8))

        def __getitem__(self, index):
            return {"pixels": np.full((1, 3, 2, 2), index % 3, np.float32), "tokens": np.int32([index])}

    calls = []

    def encode(inputs):
        pixels = inputs["pixels"]
        calls.append(pixels[:, 0, 0, 0, 0].tolist())
        return 10 * pixels[:, :, :1, 0]

    features = FeatureSource(Source(), [7, 4, 3, 2], encode, batch_size=2)
    # The last batch is filled up.
    assert sorted({value for call in calls for value in call}) == [0.0, 1.0, 2.0]
    assert [len(call) for call in calls] == [2, 2]
    for index in (7, 4, 3, 2):
        example = features[index]
        assert example.keys() == {"features", "tokens"}
        assert (example["tokens"][0], set(example["features"].ravel())) == (index, {10.0 * (index % 3)})
