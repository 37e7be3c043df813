"""LoRA as pytrees: targets, ranks, init against peft, the product, merging, norms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st

from mars_jax.adapters import lora
from mars_jax.adapters.merge import merge, unmerge
from mars_jax.adapters.norms import relative_change, update_norms
from mars_jax.adapters.targets import Target, check_ranks, find_targets, parameters_per_rank
from mars_jax.adapters.tree import init_adapters, join_trainable, split_trainable, trim
from mars_jax.errors import ConfigError
from mars_jax.runtime.trees import flatten, unflatten

SHAPES = {
    "vision/layers/fc1/kernel": (2, 6, 10),
    "vision/layers/fc1/bias": (2, 10),
    "vision/layers/norm/scale": (2, 6),
    "vision/position_embed": (4, 6),
    "projector/linear/kernel": (6, 8),
    "llm/layers/q_proj/kernel": (3, 8, 8),
    "llm/layers/v_proj/kernel": (3, 8, 5),
}
PARAMS = unflatten({path: jnp.full(shape, 0.5) for path, shape in SHAPES.items()})
PATTERNS = {"vision": ["vision/.*/fc1"], "projector": ["projector/linear"], "llm": ["llm/.*/[qv]_proj"]}
TARGETS = find_targets(PARAMS, PATTERNS)
RANKS = {"vision": 3, "projector": 2, "llm": 4}


def random_adapters(ranks=RANKS, padded_ranks=None, seed=0):
    """Adapters whose b is random below the rank and zero from there on."""
    rng = np.random.default_rng(seed)
    adapters = init_adapters(jax.random.key(seed), TARGETS, ranks, padded_ranks=padded_ranks)
    flat = flatten(adapters)
    for path, target in TARGETS.items():
        if f"{path}/b" in flat:
            b = flat[f"{path}/b"]
            mask = lora.rank_mask(b.shape[-2], ranks[target.module]).reshape((1,) * (b.ndim - 2) + (-1, 1))
            flat[f"{path}/b"] = jnp.asarray(rng.normal(size=b.shape), jnp.float32) * mask
    return unflatten(flat)


def explicit_updates(adapters):
    """Path -> scale * a @ b, float64."""
    flat = {path: np.asarray(leaf, np.float64) for path, leaf in flatten(adapters).items()}
    paths = {path.rpartition("/")[0] for path in flat}
    return {p: flat[f"{p}/scale"][..., None, None] * (flat[f"{p}/a"] @ flat[f"{p}/b"]) for p in paths}


def explicit_norm(updates, module):
    return np.sqrt(sum((update**2).sum() for path, update in updates.items() if TARGETS[path].module == module))


# Targets and ranks.


def test_targets_are_found_by_patterns_over_whole_paths():
    assert dict(TARGETS.items()) == {
        "vision/layers/fc1": Target("vision", 2, 6, 10),
        "projector/linear": Target("projector", None, 6, 8),
        "llm/layers/q_proj": Target("llm", 3, 8, 8),
        "llm/layers/v_proj": Target("llm", 3, 8, 5),
    }
    assert list(TARGETS) == [path.removesuffix("/kernel") for path in SHAPES if path.endswith("/kernel")]
    assert parameters_per_rank(TARGETS, lora.LORA) == {"vision": 2 * 16, "projector": 14, "llm": 3 * (16 + 13)}


def test_leaves_themselves_are_targets_without_a_weight_name():
    params = {"encoder": {"w": jnp.ones((4, 3)), "gain": jnp.ones(3)}}
    targets = find_targets(params, {"vision": ["encoder/w"]}, weight_name=None)
    assert targets == {"encoder/w": Target("vision", None, 4, 3)}
    adapters = init_adapters(jax.random.key(0), targets, {"vision": 2})
    adapters["encoder"]["w"]["b"] = jnp.ones((2, 3))
    merged = merge(params, adapters, weight_name=None)
    np.testing.assert_allclose(merged["encoder"]["w"], 1 + explicit_updates(adapters)["encoder/w"], rtol=1e-6)
    assert merged["encoder"]["gain"] is params["encoder"]["gain"]


@pytest.mark.parametrize(
    ("patterns", "text"),
    [
        ({"llm": ["llm/.*/[qv]_proj", "q_proj"]}, "pattern 'q_proj' of module 'llm' matches none of the 4 linears"),
        ({"llm": ["llm/.*/norm"]}, "nearest: llm/layers/"),
        ({"a": ["llm/.*"], "b": [".*/v_proj"]}, "'llm/layers/v_proj' is claimed by the modules 'a' and 'b'"),
        ({"llm": ["llm/(q_proj"]}, r"pattern 'llm/\(q_proj' of module 'llm' is not a regular expression: missing \)"),
    ],
)
def test_patterns_that_mean_nothing_are_refused(patterns, text):
    with pytest.raises(ConfigError, match=text):
        find_targets(PARAMS, patterns)


@pytest.mark.parametrize(
    ("ranks", "text"),
    [
        (RANKS | {"llm": -1}, "rank -1 of module 'llm' is negative. Use 0 to freeze"),
        (RANKS | {"llm": 6}, "rank 6 of module 'llm' is beyond the width 5 of 'llm/layers/v_proj'. Allowed: 0 to 5"),
        (dict.fromkeys(RANKS, 0), "every rank is 0 .* so nothing would train"),
        ({"vision": 3, "llm": 4}, r"ranks name the modules \['llm', 'vision'\]; the targets have"),
        (RANKS | {"audio": 2}, "ranks name the modules .*'audio'"),
    ],
)
def test_ranks_that_mean_nothing_are_refused(ranks, text):
    with pytest.raises(ConfigError, match=text):
        check_ranks(TARGETS, ranks, lora.LORA)


@pytest.mark.parametrize("ranks", [RANKS, {"vision": 6, "projector": 0, "llm": 5}, RANKS | {"vision": 0}])
def test_ranks_up_to_the_width_and_frozen_modules_are_allowed(ranks):
    check_ranks(TARGETS, ranks, lora.LORA)


@pytest.mark.parametrize(
    ("rule", "scales"),
    [
        (lora.AlphaRule(), {0: 0.0, 1: 2.0, 4: 2.0, 64: 2.0}),
        (lora.AlphaRule("fixed", 16.0), {0: 0.0, 1: 16.0, 4: 4.0, 64: 0.25}),
        (lora.AlphaRule("rslora", 8.0), {0: 0.0, 1: 8.0, 4: 4.0, 64: 1.0}),
    ],
)
def test_alpha_rules(rule, scales):
    for rank, scale in scales.items():
        assert float(rule.scale(rank)) == scale
        assert float(jax.jit(rule.scale)(rank)) == scale
    targets = {"llm/q": Target("llm", 2, 8, 8)}
    adapters = init_adapters(jax.random.key(0), targets, {"llm": 4}, lora.Lora(rule))
    np.testing.assert_array_equal(adapters["llm"]["q"]["scale"], [scales[4]] * 2)


# Init.


def test_init_has_the_distribution_of_peft():
    import peft
    import torch
    from scipy.stats import ks_2samp

    d_in, d_out, rank = 256, 32, 64
    torch.manual_seed(0)
    config = peft.LoraConfig(r=rank, target_modules=["0"])
    linear = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(d_in, d_out)), config).base_model.model[0]
    theirs = linear.lora_A["default"].weight.detach().numpy().T
    targets = {"llm": Target("llm", None, d_in, d_out)}
    ours = init_adapters(jax.random.key(0), targets, {"llm": rank})["llm"]

    assert ours["a"].shape == theirs.shape
    assert ours["b"].T.shape == linear.lora_B["default"].weight.shape
    assert not ours["b"].any()
    assert not linear.lora_B["default"].weight.any()
    bound = 1 / np.sqrt(d_in)
    for draw in (np.asarray(ours["a"]), theirs):
        assert 0.999 * bound < np.abs(draw).max() <= bound
        assert draw.std() == pytest.approx(bound / np.sqrt(3), rel=0.02)
        assert abs(draw.mean()) < 4 * bound / np.sqrt(3 * draw.size)
    assert ks_2samp(np.asarray(ours["a"]).ravel(), theirs.ravel()).pvalue > 0.01
    # Columns and rows are not copies of each other.
    assert np.abs(np.corrcoef(ours["a"].T) - np.eye(rank)).max() < 0.35


PADDED = dict.fromkeys(RANKS, 5)
draw_padded = jax.jit(lambda seed, ranks: init_adapters(jax.random.key(seed), TARGETS, ranks, padded_ranks=PADDED))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), ranks=st.fixed_dictionaries({m: st.integers(0, 5) for m in RANKS}))
def test_a_rank_is_the_first_columns_of_any_higher_rank(seed, ranks):
    low, high = (flatten(jax.device_get(draw_padded(seed, r))) for r in (ranks, PADDED))
    for path, target in TARGETS.items():
        rank = ranks[target.module]
        np.testing.assert_array_equal(low[f"{path}/a"][..., :rank], high[f"{path}/a"][..., :rank])
        assert not low[f"{path}/a"][..., rank:].any()
        assert np.abs(high[f"{path}/a"]).min() > 0
        assert np.all(low[f"{path}/scale"] == (2.0 if rank else 0.0))


def test_init_depends_on_neither_padding_nor_other_targets_and_differs_by_key_path_and_layer():
    padded = flatten(jax.device_get(draw_padded(7, RANKS)))
    alone = flatten(jax.device_get(init_adapters(jax.random.key(7), TARGETS, RANKS)))
    few = find_targets(PARAMS, {"llm": ["llm/.*/v_proj"]})
    fewer = init_adapters(jax.random.key(7), few, {"llm": 4})["llm"]["layers"]["v_proj"]["a"]
    for path, leaf in alone.items():
        trimmed = padded[path] if path.endswith("/scale") else padded[path][tuple(slice(n) for n in leaf.shape)]
        np.testing.assert_array_equal(leaf, trimmed)
    q, v = alone["llm/layers/q_proj/a"], alone["llm/layers/v_proj/a"]
    np.testing.assert_array_equal(fewer, v)
    assert not np.any(q == v)
    assert not np.any(v[0] == v[1])
    assert not np.any(v == np.asarray(draw_padded(8, RANKS)["llm"]["layers"]["v_proj"]["a"])[..., :4])


def test_a_traced_rank_needs_padded_ranks():
    with pytest.raises(TypeError, match="traced rank of module 'vision' needs padded_ranks"):
        jax.jit(lambda rank: init_adapters(jax.random.key(0), TARGETS, RANKS | {"vision": rank}))(3)


def test_rank_mask():
    np.testing.assert_array_equal(lora.rank_mask(4, 2), [1, 1, 0, 0])
    np.testing.assert_array_equal(jax.jit(lora.rank_mask, static_argnums=0)(3, 0), [0, 0, 0])


# The product, merging, trimming.


def test_lora_dense_is_the_formula():
    rng = np.random.default_rng(0)
    x, kernel, bias = rng.normal(size=(2, 3, 6)), rng.normal(size=(6, 4)), rng.normal(size=4)
    adapter = {"a": rng.normal(size=(6, 2)), "b": rng.normal(size=(2, 4)), "scale": np.float64(0.5)}
    float32 = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), (x, kernel, bias, adapter))
    expected = x @ kernel + bias + 0.5 * (x @ adapter["a"] @ adapter["b"])
    np.testing.assert_allclose(lora.lora_dense(*float32), expected, atol=1e-5)
    np.testing.assert_allclose(lora.lora_dense(*float32[:2], None, None), x @ kernel, atol=1e-5)


def test_lora_dense_works_in_the_dtype_of_its_input():
    adapter = {"a": jnp.ones((6, 2)), "b": jnp.ones((2, 4)), "scale": jnp.float32(0.5)}
    y = lora.lora_dense(jnp.ones((3, 6), jnp.bfloat16), jnp.ones((6, 4)), jnp.ones(4), adapter)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y.astype(jnp.float32), np.full((3, 4), 13.0))


class Mlp(nn.Module):
    """A model that knows nothing of LoRA."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name="last")(jax.nn.gelu(nn.Dense(8, name="first")(x)))


def test_merging_adapts_a_linen_model_that_knows_nothing_of_lora():
    model, x = Mlp(), jax.random.normal(jax.random.key(1), (5, 6))
    params = model.init(jax.random.key(0), x)["params"]
    targets = find_targets(params, {"vision": ["first"], "llm": ["last"]})
    adapters = init_adapters(jax.random.key(2), targets, {"vision": 2, "llm": 3})
    trainable, scales = split_trainable(adapters)

    def loss(trainable):
        merged = merge(params, join_trainable(trainable, scales))
        return jnp.square(model.apply({"params": merged}, x)).mean()

    step = jax.jit(lambda trainable: jax.tree.map(lambda p, g: p - 0.1 * g, trainable, jax.grad(loss)(trainable)))
    before = loss(trainable)
    for _ in range(5):
        trainable = step(trainable)
    assert loss(trainable) < 0.9 * before
    assert all(norm > 0 for norm in update_norms(join_trainable(trainable, scales), targets).values())


def test_merge_adds_the_update_and_unmerge_takes_it_off():
    adapters = random_adapters()
    updates = explicit_updates(adapters)
    merged, before = flatten(merge(PARAMS, adapters)), flatten(PARAMS)
    for path, leaf in merged.items():
        update = updates.get(path.rpartition("/")[0]) if path.endswith("/kernel") else None
        if update is None:
            assert leaf is before[path]
        else:
            np.testing.assert_allclose(leaf, before[path] + update, rtol=1e-5, atol=1e-6)
    back = flatten(unmerge(unflatten(merged), adapters))
    for path, leaf in back.items():
        np.testing.assert_allclose(leaf, before[path], atol=1e-6)


def test_merge_keeps_the_dtype_and_rounds_once():
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)
    adapters = random_adapters()
    merged = merge(params, adapters)["projector"]["linear"]["kernel"]
    exact = jnp.asarray(0.5 + explicit_updates(adapters)["projector/linear"], jnp.float32)
    assert merged.dtype == jnp.bfloat16
    np.testing.assert_array_equal(merged.astype(jnp.float32), exact.astype(jnp.bfloat16).astype(jnp.float32))


def test_trimming_cuts_padding_and_frozen_modules_and_nothing_else():
    ranks = RANKS | {"projector": 0}
    padded = random_adapters(ranks, PADDED)
    trimmed = trim(padded, TARGETS, ranks)
    assert set(trimmed) == {"vision", "llm"}
    assert {leaf.shape[-1] for path, leaf in flatten(trimmed).items() if path.endswith("/a")} == {3, 4}
    for left, right in zip(*(jax.tree.leaves(merge(PARAMS, a)) for a in (padded, trimmed)), strict=True):
        np.testing.assert_allclose(left, right, rtol=0, atol=1e-6)


def test_scales_are_split_from_what_trains_and_joined_again():
    adapters = random_adapters()
    trainable, scales = split_trainable(adapters)
    assert {path.rpartition("/")[2] for path in flatten(trainable)} == {"a", "b"}
    assert {path.rpartition("/")[2] for path in flatten(scales)} == {"scale"}
    joined = flatten(join_trainable(trainable, scales))
    assert all(joined[path] is leaf for path, leaf in flatten(adapters).items())


# Norms.


def test_norms_and_relative_change_are_those_of_the_explicit_product():
    old, new = random_adapters(seed=1), random_adapters(seed=2)
    before, after = explicit_updates(old), explicit_updates(new)
    norms, change = update_norms(new, TARGETS), relative_change(new, old, TARGETS)
    for module in RANKS:
        norm = explicit_norm(after, module)
        assert float(norms[module]) == pytest.approx(norm, rel=1e-5)
        difference = explicit_norm({path: after[path] - before[path] for path in after}, module)
        assert float(change[module]) == pytest.approx(difference / norm, rel=1e-5)


def test_norms_of_padded_adapters_and_of_a_module_without_movement():
    start, moved = init_adapters(jax.random.key(0), TARGETS, RANKS), random_adapters()
    moved["projector"] = start["projector"]
    norms, change = update_norms(moved, TARGETS), relative_change(moved, start, TARGETS)
    assert float(norms["projector"]) == 0.0
    assert np.isnan(change["projector"])
    assert float(change["llm"]) == pytest.approx(1.0, rel=1e-5)
    padded = update_norms(random_adapters(RANKS, PADDED, seed=3), TARGETS)
    trimmed = update_norms(trim(random_adapters(RANKS, PADDED, seed=3), TARGETS, RANKS), TARGETS)
    for module in RANKS:
        assert float(padded[module]) == pytest.approx(float(trimmed[module]), rel=1e-6)


def test_a_module_padded_to_rank_0_has_norm_0():
    ranks = RANKS | {"projector": 0}
    adapters = random_adapters(ranks)
    assert "projector" not in adapters
    assert float(update_norms(adapters, TARGETS)["projector"]) == 0.0
    assert np.isnan(relative_change(adapters, adapters, TARGETS)["projector"])
    assert float(relative_change(adapters, adapters, TARGETS)["llm"]) < 1e-3


def test_norms_ask_for_full_precision_where_the_backend_would_round():
    adapters = random_adapters()
    with jax.default_matmul_precision("bfloat16"):
        text = str(
            jax.make_jaxpr(lambda a: (update_norms(a, TARGETS), lora.LORA.delta(None, a["llm"]["layers"]["q_proj"])))(
                adapters
            )
        )
    assert text.count("dot_general[") == 2 * len(TARGETS) + 1
    assert text.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") == text.count("dot_general[")
