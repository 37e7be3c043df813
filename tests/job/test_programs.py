"""Which programs a job needs, its devices, and the cached encoder, whose lanes learn what those that see pixels do."""

from functools import partial
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from mars_jax.adapters.tree import init_adapters, join_trainable, split_trainable
from mars_jax.config.load import load_config
from mars_jax.data.features import FeatureSource
from mars_jax.job.job import make_job
from mars_jax.job.programs import lane_groups, probe_programs
from mars_jax.lanes.lane import Lane
from mars_jax.lanes.step import mean_loss
from mars_jax.runtime.progress import ConsoleReporter
from mars_jax.runtime.trees import flatten
from mars_jax.search.probes.design import planned_lanes
from tests.helpers import tiny_job


def lane(vision, llm, num_samples=8, seed=0):
    return Lane({"vision": vision, "llm": llm}, num_samples, seed)


def test_the_lanes_of_a_group_share_their_data_and_groups_are_as_equal_as_can_be():
    lanes = [lane(v, n, d, s) for d in (16, 8) for s in (0, 1) for v in range(7) for n in (1,)]
    groups = lane_groups(lanes, most=3)
    assert [len(group) for group in groups] == [3, 3, 1] * 4
    assert [lane for group in groups for lane in group] == lanes
    assert all(len({(lane.num_samples, lane.seed) for lane in group}) == 1 for group in groups)
    assert [len(group) for group in lane_groups(lanes[:7], most=4)] == [4, 3]
    assert [len(group) for group in lane_groups(lanes[:7], most=7)] == [7]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("job")
    base, train = tiny_job.checkpoint(folder / "base"), tiny_job.records(folder / "data", 60)
    rule = {"rule": "loss_fraction", "epsilon": None}
    config = load_config(tiny_job.config(folder / "a.yaml", base, train, folder / "run", convergence=rule))
    return make_job(config, ConsoleReporter())


def test_the_programs_of_a_job_hold_every_lane_once_in_slots_enough(job):
    lanes = planned_lanes(job.config)
    programs = probe_programs(job, lanes, 2)
    grouped = [lane for program in programs for group in program.groups for lane in group]
    assert sorted(lane.name for lane in grouped) == sorted(lane.name for lane in lanes)
    for program in programs:
        assert program.engine.num_slots % program.engine.lane_devices == 0
        assert max(map(len, program.groups)) <= program.engine.num_slots
        assert program.engine.cached_encoder == program.bucket.cached_encoder
        assert program.engine.layout.ranks == program.bucket.padded_ranks
        assert all(len(group) <= job.config.probe.lanes_per_program for group in program.groups)


@pytest.mark.parametrize(
    ("sizes", "number"),
    # Of eight; a program of this job has six lanes at most.
    [({}, 6), ({"lane": 1}, 1), ({"lane": 2, "data": 2}, 4), ({"data": 2}, 8), ({"lane": 4, "tensor": -1}, 8)],
)
def test_of_a_cpus_cores_as_many_are_used_as_the_config_asks_for(job, sizes, number):
    config = job.config.model_copy(update={"mesh": job.config.mesh.model_copy(update=sizes)})
    mesh = make_job(config, ConsoleReporter()).base.mesh
    assert mesh.size == number
    assert all(mesh.shape[axis] == size for axis, size in sizes.items() if size > 0)


QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
LLM_ONLY = Lane({"vision": 0, "projector": 0, "llm": 4}, 16, 1)


def test_cached_features_give_the_losses_and_gradients_of_pixels(job):
    pixels, features = (job.data.probe_stream(LLM_ONLY, cached_encoder=cached) for cached in (False, True))
    adapters = init_adapters(jax.random.key(1), job.base.targets, LLM_ONLY.ranks, padded_ranks=LLM_ONLY.ranks)
    rng = np.random.default_rng(0)
    adapters = jax.tree.map(lambda leaf: rng.normal(0.0, 0.3, leaf.shape).astype(np.float32), adapters)
    trainable, scales = split_trainable(adapters)
    base = jax.device_get(job.base.params)

    @partial(jax.jit, compiler_options=QUICK)
    def step(trainable, batch):
        def loss(trainable):
            return mean_loss(job.base.model, base, join_trainable(trainable, scales), batch)

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


def test_the_pixels_of_the_validation_went_along_with_their_features(job):
    pixels, features = (job.data.validation_batches(4, cached_encoder=cached) for cached in (False, True))
    encode = jax.jit(lambda x: job.base.model.apply({"params": jax.device_get(job.base.params)}, x, method="encode"))
    np.testing.assert_allclose(features["features"][0], encode({"pixels": pixels["pixels"][0]}), rtol=1e-5, atol=1e-5)
    assert features.keys() - {"features"} == pixels.keys() - {"pixels"}
    assert "pixels" not in features


def test_every_picture_is_encoded_once():
    class Source:
        """Eight records of three pictures."""

        records = tuple(SimpleNamespace(digests=("abc"[i % 3],)) for i in range(8))
        encoder_inputs = ("pixels",)

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
