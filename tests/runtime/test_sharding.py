"""The mesh, rules for parameters, refusals by name, and a sharded base that computes what a whole one does."""

import re
import socket
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from mars_jax.adapters.tree import init_adapters, join_trainable, split_trainable
from mars_jax.errors import ConfigError
from mars_jax.models.shardings import base_shardings
from mars_jax.runtime.sharding import (
    AXES,
    batch_sharding,
    check_batch,
    chunk_sharding,
    lane_sharding,
    make_mesh,
    place,
    split_by_rules,
)
from mars_jax.runtime.trees import flatten
from tests.helpers import tiny_lanes

# The partitioner is under test, not LLVM: half of the compile time.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


# The mesh.


def test_the_mesh_has_all_axes_whatever_is_named():
    mesh = make_mesh({"tensor": 2, "data": -1})
    assert dict(mesh.shape) == {"lane": 1, "data": 4, "fsdp": 1, "tensor": 2}
    assert mesh.axis_names == AXES
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}
    assert make_mesh({"lane": -1}, jax.devices()[:3]).shape["lane"] == 3
    assert make_mesh({}, jax.devices()[:1]).size == 1


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        (
            {"fsdp": 3},
            "mesh lane=1 x data=1 x fsdp=3 x tensor=1: the sizes multiply to 3, and there are 8 devices. "
            "Make the product 8, or one size -1, the rest.",
        ),
        (
            {"fsdp": 3, "lane": -1},
            "mesh lane=-1 x data=1 x fsdp=3 x tensor=1: the sizes multiply to 3, and there are 8 devices. "
            "Make the product a divisor of it: 1, 2, 4, 8.",
        ),
        ({"fsdp": 16, "lane": -1}, "multiply to 16, and there are 8 devices"),
        ({"lane": -1, "data": -1}, "lane=-1 x data=-1 x fsdp=1 x tensor=1: sizes are at least 1, and one may be -1"),
        ({"lane": 0}, "mesh lane=0 x data=1 x fsdp=1 x tensor=1: sizes are at least 1"),
        ({"lane": -2}, "mesh lane=-2"),
        ({"probe": 8}, "mesh: there is no axis probe. The axes are lane, data, fsdp, tensor."),
    ],
)
def test_sizes_that_make_no_mesh_of_the_devices_are_refused(sizes, text):
    with pytest.raises(ConfigError, match=re.escape(text)):
        make_mesh(sizes)


# Rules.

RULES = (
    (r".*/up/kernel", ("fsdp", "tensor")),
    (r".*/kernel", ("tensor", "fsdp")),
    (r"embedding", (None, ("fsdp", "tensor"))),
    (r".*/scale", (None,)),
)


def test_the_first_rule_that_fits_splits_a_parameter_and_never_its_layers():
    shapes = {"llm/layers/up/kernel": (3, 8, 4), "head/down/kernel": (8, 4), "norm/scale": (3,)}
    shardings = flatten(split_by_rules(shapes, make_mesh({"fsdp": 2, "tensor": 2, "data": -1}), RULES))
    assert {path: sharding.spec for path, sharding in shardings.items()} == {
        "llm/layers/up/kernel": P(None, "fsdp", "tensor"),
        "head/down/kernel": P("tensor", "fsdp"),
        "norm/scale": P(None),
    }


@pytest.mark.parametrize(
    ("path", "shape"),
    [("llm/layers/mlp/experts", (2, 8, 8)), ("llm/layers/up/kernel", (8, 8)), ("extra", (8,))],
)
def test_a_parameter_without_a_rule_is_refused(path, shape):
    text = f"no rule matches the parameter {path} of shape {list(shape)}. Add one to the model family's shardings."
    with pytest.raises(ConfigError, match=re.escape(text)):
        split_by_rules({path: shape}, make_mesh({"lane": -1}), RULES)


def test_dimensions_that_the_mesh_does_not_divide_are_refused_by_name():
    shapes = {
        "llm/layers/up/kernel": (3, 16, 12),
        "llm/layers/down/kernel": (3, 36, 16),
        "embedding": (409, 12),
        "llm/norm/scale": (7,),
    }
    with pytest.raises(ConfigError) as refusal:
        split_by_rules(shapes, make_mesh({"tensor": 8}), RULES)
    assert str(refusal.value) == (
        "mesh: these dimensions can't be split evenly:\n"
        "  llm/layers/up/kernel [3, 16, 12]: axis 2 has size 12, mesh axis tensor has size 8\n"
        "  llm/layers/down/kernel [3, 36, 16]: axis 1 has size 36, mesh axis tensor has size 8\n"
        "  embedding [409, 12]: axis 1 has size 12, mesh axis fsdp x tensor has size 8\n"
        "Sizes that divide all: tensor 1, 2, 3, 4, 6, 12; fsdp x tensor 1, 2, 3, 4, 6, 12."
    )
    split_by_rules(shapes, make_mesh({"tensor": 2, "fsdp": 2, "lane": 2}), RULES)
    split_by_rules(shapes, make_mesh({"lane": 8}), RULES)


def test_a_batch_that_the_mesh_does_not_divide_is_refused():
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    check_batch(12, mesh)
    text = (
        "a batch of 6 samples can't be split evenly over mesh data=2 x fsdp=2, 4 parts. "
        "Make the batch size a multiple of 4, or the parts one of 1, 2, 3, 6."
    )
    with pytest.raises(ConfigError, match=re.escape(text)):
        check_batch(6, mesh)


# Placing and computing.


def test_batches_and_lanes_are_split_along_their_axes():
    mesh = make_mesh({"data": 2, "fsdp": 2, "lane": 2})
    host = np.arange(48.0, dtype=np.float32).reshape(2, 8, 3)
    batches = place({"x": host}, chunk_sharding(mesh))["x"]
    lanes = place(host, lane_sharding(mesh))
    assert {shard.data.shape for shard in batches.addressable_shards} == {(2, 2, 3)}
    assert {shard.data.shape for shard in lanes.addressable_shards} == {(1, 8, 3)}
    moved = place(lanes, chunk_sharding(mesh))
    for array in (batches, lanes, moved):
        np.testing.assert_array_equal(array, host)


def test_a_sharded_base_gives_the_loss_and_gradients_of_a_whole_one():
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    base = tiny_lanes.base()
    batch = jax.tree.map(lambda leaf: leaf[0], tiny_lanes.VALIDATION)
    shapes = jax.eval_shape(
        lambda: init_adapters(jax.random.key(0), tiny_lanes.TARGETS, tiny_lanes.PADDED)  # b would be zero
    )
    rng = np.random.default_rng(0)
    adapters = jax.tree.map(lambda leaf: rng.normal(0.0, 0.5, leaf.shape).astype(np.float32), shapes)
    trainable, scales = split_trainable(adapters)

    def loss(trainable, base, batch):
        variables = {"params": base, "lora": join_trainable(trainable, scales)}
        logits = tiny_lanes.MODEL.apply(variables, batch)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]).mean()

    both = partial(jax.jit, jax.value_and_grad(loss), compiler_options=QUICK)
    expected, expected_gradients = both()(trainable, base, batch)
    replicated = jax.sharding.NamedSharding(mesh, P())
    shardings = base_shardings(tiny_lanes.CONFIG, mesh)
    sharded = place(base, shardings)
    assert sharded["llm"]["layers"]["mlp"]["up_proj"]["kernel"].addressable_shards[0].data.shape == (1, 8, 12)
    program = both(in_shardings=(replicated, shardings, batch_sharding(mesh)))
    value, gradients = program(place(trainable, replicated), sharded, place(batch, batch_sharding(mesh)))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected_gradients))
    assert largest > 1e-2
    for path, gradient in flatten(gradients).items():
        np.testing.assert_allclose(
            gradient, flatten(expected_gradients)[path], rtol=1e-5, atol=1e-5 * largest, err_msg=path
        )


TWO_PROCESSES = """
import sys
import jax, numpy as np
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(f"127.0.0.1:{sys.argv[1]}", 2, int(sys.argv[2]))
from mars_jax.runtime.sharding import lane_sharding, make_mesh, place, split_by_rules
kernel = np.arange(32, dtype=np.float32).reshape(4, 8)
mesh = make_mesh({"fsdp": 2, "tensor": -1})
base = {"llm": {"lm_head": {"kernel": kernel}}}
shardings = split_by_rules({"llm/lm_head/kernel": kernel.shape}, mesh, [(".*/kernel", ("fsdp", "tensor"))])
ours = place(base, shardings)
local = place(jax.tree.map(jax.numpy.asarray, base), shardings)
moved = place(ours["llm"]["lm_head"]["kernel"], lane_sharding(make_mesh({"lane": -1})))
for array in (ours["llm"]["lm_head"]["kernel"], local["llm"]["lm_head"]["kernel"], moved):
    assert not array.is_fully_addressable
    for shard in array.addressable_shards:
        assert shard.data.size == 8
        np.testing.assert_array_equal(shard.data, kernel[shard.index])
print(float(jax.jit(lambda x: x.sum())(moved)))
"""


def test_two_processes_each_place_their_own_parts():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES, port, str(rank)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        for process in processes:
            out, err = process.communicate(timeout=60)
            assert out.splitlines()[-1:] == ["496.0"], err
    finally:
        for process in processes:
            process.kill()
