"""One suite for every adapter method, and for one from outside: what the others may rely on, whatever the method."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mars_jax.adapters.files import read_adapters, write_adapters
from mars_jax.adapters.lora import LORA, AlphaRule
from mars_jax.adapters.merge import merge, unmerge
from mars_jax.adapters.method import NO_CONTEXT, Context, MethodSettings, leaf_names
from mars_jax.adapters.norms import relative_change, update_norms
from mars_jax.adapters.registry import METHODS
from mars_jax.adapters.targets import check_ranks, count_parameters, find_targets, parameters_per_rank
from mars_jax.adapters.tree import init_adapters, join_trainable, kernels_of, pad, split_trainable, trim
from mars_jax.adapters.vector import VectorLayout
from mars_jax.errors import ConfigError
from mars_jax.models.layers import Dense
from mars_jax.runtime.trees import flatten, subtree, unflatten
from tests.helpers.toy_method import GAIN

SHAPES = {"vision/layers/fc1": (2, 6, 10), "projector/linear": (6, 8), "llm/layers/q_proj": (3, 8, 5)}
RNG = np.random.default_rng(0)
PARAMS = unflatten(
    {f"{path}/kernel": jnp.asarray(RNG.normal(size=shape), jnp.float32) for path, shape in SHAPES.items()}
)
TARGETS = find_targets(PARAMS, {path.split("/")[0]: [path] for path in SHAPES})
KERNELS = kernels_of(PARAMS, TARGETS)
MODULES = ("vision", "projector", "llm")
# Programs are compiled to run three times.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@pytest.fixture(params=[*METHODS.names, GAIN.name])
def method(request, monkeypatch):
    monkeypatch.setattr(METHODS, "_members", dict(METHODS._members))
    METHODS.register(GAIN)
    return METHODS[request.param]


def ranks_of(method):
    """Ranks, some of them smaller than the columns."""
    return {"vision": 3, "projector": 2, "llm": 4} if method.has_ranks else dict.fromkeys(MODULES, 1)


def columns_of(method):
    return dict.fromkeys(MODULES, 5 if method.has_ranks else 1)


def fresh(method, ranks=None, columns=None, seed=0):
    return init_adapters(jax.random.key(seed), TARGETS, ranks or ranks_of(method), method, columns, KERNELS)


def trained(method, seed=1):
    """Adapters whose trained leaves are random numbers, as if after some steps."""
    rng = np.random.default_rng(seed)
    moving, fixed = split_trainable(fresh(method), method)
    moving = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0.0, 0.3, leaf.shape), jnp.float32), moving)
    return join_trainable(moving, fixed)


def without_layers(path, tree):
    """Kernel and leaves of the first layer of a linear."""
    node = subtree(tree, path)
    return {name: leaf[0] if len(SHAPES[path]) == 3 else leaf for name, leaf in node.items()}


def applied(method, path, adapters, x):
    kernel = without_layers(path, PARAMS)["kernel"]
    return method.apply(x, kernel, jnp.ones(kernel.shape[1]), without_layers(path, adapters), NO_CONTEXT)


def inputs(path):
    return jax.random.normal(jax.random.key(3), (2, 4, SHAPES[path][-2]))


def deltas(method, adapters):
    return {path: np.asarray(method.delta(KERNELS[path], subtree(adapters, path)), np.float64) for path in SHAPES}


# What a method declares.


def test_its_name_is_that_of_its_registry(method):
    assert METHODS[method.name] is method
    assert method.configured(MethodSettings(alpha=AlphaRule("fixed", 8.0))).name == method.name


def test_fresh_adapters_have_the_leaves_it_declares(method):
    ranks, columns = ranks_of(method), columns_of(method)
    traced = jax.jit(lambda ranks: fresh(method, ranks, columns))({m: jnp.int32(r) for m, r in ranks.items()})
    for adapters, width in ((fresh(method), ranks), (traced, columns)):
        expected = {
            f"{path}/{name}": leaf.shape
            for path, target in TARGETS.items()
            for name, leaf in method.leaves(target, width[target.module]).items()
        }
        assert {path: leaf.shape for path, leaf in flatten(adapters).items()} == expected
        assert {leaf.dtype for leaf in jax.tree.leaves(adapters)} == {jnp.dtype("float32")}
    assert any(leaf_names(method).values())
    assert all(not method.leaves(target, 0) for target in TARGETS.values())


def test_the_numbers_that_a_module_shares_are_untrained_leaves_of_fresh_adapters(method):
    flat, ranks = flatten(fresh(method)), ranks_of(method)
    for path, target in TARGETS.items():
        for name, value in method.fixed(ranks[target.module]).items():
            assert not leaf_names(method)[name]
            np.testing.assert_array_equal(flat[f"{path}/{name}"], np.broadcast_to(value, flat[f"{path}/{name}"].shape))


def test_its_peft_format_names_trained_leaves_and_a_shared_number(method):
    peft = method.peft()
    if peft is not None:
        assert set(peft.tensors) == {name for name, trains in leaf_names(method).items() if trains}
        assert peft.scale in method.fixed(1)


def test_a_method_without_ranks_takes_0_and_1_alone(method):
    check_ranks(TARGETS, {"vision": 1, "projector": 0, "llm": 1}, method)
    if method.has_ranks:
        check_ranks(TARGETS, ranks_of(method), method)
    else:
        with pytest.raises(ConfigError, match=r"rank 2 of module 'llm' means nothing .*llm.ranks to \[1\] to train"):
            check_ranks(TARGETS, {"vision": 1, "projector": 0, "llm": 2}, method)


# What it computes.


@pytest.mark.parametrize("path", SHAPES)
def test_fresh_adapters_change_nothing(method, path):
    x, kernel = inputs(path), without_layers(path, PARAMS)["kernel"]
    layer = Dense(kernel.shape[1])
    base = {"kernel": kernel, "bias": jnp.ones(kernel.shape[1])}
    alone = layer.apply({"params": base}, x)
    for adapters in (fresh(method), fresh(method, columns=columns_of(method))):
        np.testing.assert_array_equal(applied(method, path, adapters, x), alone)
        variables = {"params": base, method.name: without_layers(path, adapters)}
        np.testing.assert_array_equal(layer.apply(variables, x), alone)


@pytest.mark.parametrize("path", SHAPES)
def test_what_it_computes_is_the_product_with_the_merged_weight(method, path):
    x, adapters = inputs(path), trained(method)
    merged = without_layers(path, merge(PARAMS, adapters, method=method))["kernel"]
    ours = applied(method, path, adapters, x)
    np.testing.assert_allclose(ours, jnp.matmul(x, merged) + 1.0, rtol=0, atol=1e-5)
    assert np.abs(ours - applied(method, path, fresh(method), x)).max() > 0.1


def test_what_it_computes_depends_on_leaves_alone_not_on_its_settings(method):
    adapters, other = trained(method), method.configured(MethodSettings(alpha=AlphaRule("fixed", 64.0)))
    for path in SHAPES:
        expected = applied(method, path, adapters, inputs(path))
        np.testing.assert_array_equal(applied(other, path, adapters, inputs(path)), expected)
    jax.tree.map(np.testing.assert_array_equal, deltas(other, adapters), deltas(method, adapters))


# Not the toy: its update depends on the weight that it would be taken off.
@pytest.mark.parametrize("method", METHODS.names, indirect=True)
def test_merging_and_taking_off_again_gives_the_base(method):
    adapters = trained(method)
    back = unmerge(merge(PARAMS, adapters, method=method), adapters, method=method)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=1e-6), back, PARAMS)


def test_a_host_merges_without_a_device(method):
    adapters = trained(method)
    for path in SHAPES:
        leaves = jax.device_get(subtree(adapters, path))
        on_host = method.delta(np.asarray(KERNELS[path]), leaves)
        assert isinstance(on_host, np.ndarray)
        np.testing.assert_allclose(on_host, method.delta(KERNELS[path], subtree(adapters, path)), rtol=1e-5, atol=1e-6)


def test_norms_and_changes_are_those_of_its_delta(method):
    new, old = trained(method, 1), trained(method, 2)
    norms = update_norms(new, TARGETS, method, KERNELS)
    changes = relative_change(new, old, TARGETS, method, KERNELS)
    after, before = deltas(method, new), deltas(method, old)
    for path, target in TARGETS.items():
        size = np.sqrt((after[path] ** 2).sum())
        assert float(norms[target.module]) == pytest.approx(size, rel=1e-5)
        change = np.sqrt(((after[path] - before[path]) ** 2).sum()) / size
        assert float(changes[target.module]) == pytest.approx(change, rel=1e-5)


def test_adapters_round_trip_through_a_vector_and_a_file(method, tmp_path):
    for columns in (ranks_of(method), {**ranks_of(method), "projector": 0}):
        kept = {path: target for path, target in TARGETS.items() if columns[target.module]}
        adapters = unflatten(
            {path: leaf for path, leaf in flatten(trained(method)).items() if path.rpartition("/")[0] in kept}
        )
        layout = VectorLayout(method, TARGETS, columns)
        vector = layout.ravel(adapters)
        assert vector.shape == (layout.size,) == (count_parameters(TARGETS, columns, method),)
        back = layout.adapters(vector, layout.fixed(adapters, columns))
        write_adapters(tmp_path / "adapters.safetensors", adapters)
        for other in (back, read_adapters(tmp_path / "adapters.safetensors")):
            assert jax.tree.structure(other) == jax.tree.structure(adapters)
            jax.tree.map(np.testing.assert_array_equal, other, adapters)
            assert jax.tree.map(jnp.shape, other) == jax.tree.map(jnp.shape, adapters)


def test_trimming_undoes_padding(method):
    adapters, ranks, columns = trained(method), ranks_of(method), columns_of(method)
    padded = pad(adapters, TARGETS, columns, method)
    layout = VectorLayout(method, TARGETS, columns)
    np.testing.assert_array_equal(layout.padded_vector(adapters), layout.ravel(padded))
    back = trim(padded, TARGETS, ranks, method)
    assert jax.tree.structure(back) == jax.tree.structure(adapters)
    jax.tree.map(np.testing.assert_array_equal, back, adapters)
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=0, atol=1e-6), deltas(method, padded), deltas(method, adapters)
    )
    assert set(trim(padded, TARGETS, {**ranks, "llm": 0}, method)) == {"vision", "projector"}


def three_steps(method, ranks, columns):
    """The adapters of three steps of AdamW with clipping on a loss of every linear, and the losses."""
    layout = VectorLayout(method, TARGETS, columns)
    adapters = fresh(method, ranks, columns)
    vector, fixed = layout.ravel(adapters), layout.fixed(adapters, ranks)
    adamw = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1, weight_decay=0.05))

    def loss(vector):
        tree, total = layout.adapters(vector, fixed), 0.0
        for path in SHAPES:
            if path.split("/")[0] in tree:
                total += jnp.square(applied(method, path, tree, inputs(path)) - 1.0).mean()
        return total

    @partial(jax.jit, compiler_options=QUICK)
    def step(vector, state):
        with jax.numpy_dtype_promotion("standard"):  # optax mixes types; ours does not
            value, gradient = jax.value_and_grad(loss)(vector)
            updates, state = adamw.update(gradient, state, vector)
            return value, optax.apply_updates(vector, updates), state

    state, losses = adamw.init(vector), []
    for _ in range(3):
        value, vector, state = step(vector, state)
        losses.append(float(value))
    return layout.adapters(vector, fixed), [*losses, float(loss(vector))]


def test_padding_is_exact_where_it_says_so(method):
    ranks = {**ranks_of(method), "projector": 0}
    padded, losses = three_steps(method, ranks, columns_of(method))
    alone, expected = three_steps(method, ranks, ranks)
    if not method.padding_is_exact:
        assert update_norms(padded, TARGETS, method, KERNELS)["projector"] > 0.0
        return
    # The frozen module adds its loss to all, and no change.
    np.testing.assert_allclose(np.diff(losses), np.diff(expected), rtol=0, atol=1e-5)
    assert losses[-1] < losses[0] - 0.1
    trimmed = flatten(trim(padded, TARGETS, ranks, method))
    for path, leaf in flatten(alone).items():
        np.testing.assert_allclose(trimmed[path], leaf, rtol=0, atol=1e-6, err_msg=path)
    again = pad(trim(padded, TARGETS, ranks, method), TARGETS, columns_of(method), method)
    jax.tree.map(np.testing.assert_array_equal, split_trainable(again, method)[0], split_trainable(padded, method)[0])
    assert float(update_norms(padded, TARGETS, method)["projector"]) == 0.0


# What it costs.


def test_flops_are_none_when_frozen_and_grow_with_what_is_asked_for(method):
    target = TARGETS["llm/layers/q_proj"]

    def flops(rank=1, rows=8.0, trains=True, moves=False):
        return method.flops(target, rank, rows, trains=trains, moves=moves)

    assert flops(rank=0) == flops(rank=0, trains=False) == 0.0
    assert 0.0 <= flops(trains=False) < flops() <= flops(moves=True)
    assert flops(rows=16.0) == 2 * flops()
    assert not method.has_ranks or flops(rank=2) > flops()


def test_its_parameters_are_what_trains(method):
    ranks = ranks_of(method)
    moving, _ = split_trainable(fresh(method), method)
    assert count_parameters(TARGETS, ranks, method) == sum(leaf.size for leaf in jax.tree.leaves(moving))
    assert count_parameters(TARGETS, dict.fromkeys(MODULES, 0), method) == 0
    each = parameters_per_rank(TARGETS, method)
    assert sum(each[module] * rank for module, rank in ranks.items()) == count_parameters(TARGETS, ranks, method)


# The layer that asks.


def test_a_layer_takes_the_method_whose_collection_has_leaves_for_it_and_tells_it_the_modality(monkeypatch):
    monkeypatch.setattr(METHODS, "_members", dict(METHODS._members))
    METHODS.register(GAIN)
    layer, x = Dense(5), inputs("llm/layers/q_proj")
    base = layer.init(jax.random.key(0), x)["params"]
    leaves = {"gain": jnp.full(5, 0.5), "steps": jnp.float32(0.0)}
    alone = layer.apply({"params": base, "lora": {}, "other": {"gain": jnp.ones(5)}}, x)
    np.testing.assert_array_equal(alone, layer.apply({"params": base}, x))
    modality = jnp.asarray([[1, 1, 0, 0], [0, 1, 0, 1]])
    seen = layer.apply({"params": base, "gain": leaves}, x, Context(modality))
    np.testing.assert_array_equal(seen[modality == 0], alone[modality == 0])
    np.testing.assert_allclose(seen[modality == 1], 1.5 * alone[modality == 1], rtol=1e-6)  # the bias is zero
    with pytest.raises(ValueError, match="has adapters of lora and gain; a layer takes one method"):
        layer.apply({"params": base, "gain": leaves, "lora": {"a": jnp.ones((8, 1))}}, x)


def test_a_method_without_a_delta_is_not_merged_and_has_to_measure_itself():
    class Gated(type(LORA)):
        name = "gated"

        def delta(self, kernel, leaves):
            return None

        squared_norm = super(type(LORA), LORA).squared_norm.__func__

    adapters = trained(LORA)
    with pytest.raises(ConfigError, match=r"'gated' computes what no addition to the weights gives.*can't be merged"):
        merge(PARAMS, adapters, method=Gated())
    with pytest.raises(NotImplementedError, match="'gated' has no delta, so it must define squared_norm"):
        update_norms(adapters, TARGETS, Gated())
