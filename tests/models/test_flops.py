"""The closed-form FLOPs against the products that XLA compiles, with each module adapted and with none below it."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from benchmarks.speed import xla_flops
from mars_jax.adapters.full_rank import FULL_RANK
from mars_jax.adapters.targets import Target
from mars_jax.adapters.tree import init_adapters, join_trainable, split_trainable
from mars_jax.lanes.step import mean_loss
from mars_jax.models.families.llava.model import LlavaOnevision
from mars_jax.models.flops import BatchShape, evaluation_flops, lane_step_flops
from tests.helpers import tiny_lanes

SHAPES = {"batch_size": 2, "tokens": 12, "tiles": 2, "supervised": 3}
SHAPE = BatchShape(**SHAPES)
TWO_LAYERS = dataclasses.replace(
    tiny_lanes.CONFIG,
    vision=dataclasses.replace(tiny_lanes.CONFIG.vision, num_layers=2),
    text=dataclasses.replace(tiny_lanes.CONFIG.text, num_layers=2, tie_word_embeddings=True),
    vision_feature_layers=(2,),
)
ALL = {"vision": 4, "projector": 2, "llm": 3}
FROZEN = {"vision": 0, "projector": 0, "llm": 0}
# Every model is compiled to be counted, never run.
QUICK = {"xla_backend_optimization_level": 0}


def case(config=tiny_lanes.CONFIG, ranks=ALL, **changes):
    return xla_flops.Case(config, ranks, patterns=tiny_lanes.PATTERNS, **SHAPES | changes)


@pytest.mark.parametrize(
    "case",
    [
        case(TWO_LAYERS),
        case(ranks=FROZEN | {"vision": 4}),
        case(ranks=FROZEN | {"projector": 2}),
        case(ranks=FROZEN | {"llm": 3}, cached_encoder=True),
    ],
    ids=["all modules, two layers", "vision", "projector", "llm, cached encoder"],
)
def test_a_lane_step_compiles_to_the_fewest_products(case):
    compiled = xla_flops.count(xla_flops.compile_step(case, **QUICK))["products"]
    assert compiled == pytest.approx(case.minimum()["total"], rel=0.005)


@pytest.mark.parametrize("ranks", [dict.fromkeys(ALL, 1), FROZEN | {"llm": 1}], ids=["all modules", "llm"])
def test_a_lane_step_at_full_rank_compiles_to_the_fewest_products(ranks):
    tiny = case()
    adapters = jax.eval_shape(lambda: init_adapters(jax.random.key(0), tiny.targets, ranks, FULL_RANK))
    trained, fixed = split_trainable(adapters, FULL_RANK)

    def loss(trained, fixed, base, batch):
        return mean_loss(LlavaOnevision(tiny.config), base, join_trainable(trained, fixed), batch, FULL_RANK)

    step = jax.jit(jax.value_and_grad(loss), compiler_options=QUICK).lower(trained, fixed, tiny.base, tiny.batch)
    expected = lane_step_flops(tiny.config, tiny.targets, ranks, SHAPE, method=FULL_RANK)
    assert xla_flops.count(step.compile())["products"] == pytest.approx(expected.total, rel=0.005)
    assert expected.adapters > 0


def test_an_evaluation_compiles_to_the_fewest_products():
    tiny = case()
    adapters = jax.eval_shape(lambda: init_adapters(jax.random.key(0), tiny.targets, ALL))
    loss = jax.jit(partial(mean_loss, LlavaOnevision(tiny.config)), compiler_options=QUICK)
    compiled = xla_flops.count(loss.lower(tiny.base, adapters, tiny.batch).compile())["products"]
    assert compiled == pytest.approx(evaluation_flops(tiny.config, tiny.targets, ALL, SHAPE).total, rel=0.005)


def test_products_in_a_loop_are_counted_once_a_trip():
    def power(x):
        return jax.lax.fori_loop(0, 50, lambda _, y: jnp.tanh(y @ x), x)

    program = jax.jit(power).lower(jax.ShapeDtypeStruct((8, 8), jnp.float32)).compile()
    assert " while(" in program.as_text()
    assert xla_flops.product_flops(program.as_text()) == 50 * 2 * 8**3
    with pytest.raises(ValueError, match="counts the body of a loop once"):
        xla_flops.count(program)


def test_flops_rise_with_each_rank_and_only_in_the_low_rank_part():
    before = lane_step_flops(tiny_lanes.CONFIG, tiny_lanes.TARGETS, ALL, SHAPE)
    for module in ALL:
        more = lane_step_flops(tiny_lanes.CONFIG, tiny_lanes.TARGETS, ALL | {module: ALL[module] + 1}, SHAPE)
        assert more.adapters > before.adapters
        assert more.total - before.total == more.adapters - before.adapters


def test_without_an_adapter_below_nothing_flows_back():
    count = partial(lane_step_flops, tiny_lanes.CONFIG, tiny_lanes.TARGETS, shape=SHAPE)
    forward = evaluation_flops(tiny_lanes.CONFIG, tiny_lanes.TARGETS, ALL, SHAPE)
    llm = count(FROZEN | {"llm": 3})
    assert (llm.encoder, llm.projector) == (forward.encoder, forward.projector)
    assert count(FROZEN | {"projector": 2}).projector == pytest.approx(forward.projector + 2 * 2 * 2 * 4 * 16 * 16)
    assert llm.head == 2 * forward.head
    cached = count(FROZEN | {"llm": 3}, cached_encoder=True)
    assert cached.encoder == 0
    assert cached.total < llm.total


def test_an_adapted_encoder_is_not_cached():
    with pytest.raises(ValueError, match=r"can't come from a cache while 'vision/layers/mlp/fc1' is adapted"):
        lane_step_flops(tiny_lanes.CONFIG, tiny_lanes.TARGETS, ALL, SHAPE, cached_encoder=True)


def test_a_target_that_the_model_lacks_is_refused():
    targets = {"llm/layers/mlp/gate": Target("llm", 1, 16, 24)}
    with pytest.raises(ValueError, match=r"no linear 'llm/layers/mlp/gate'"):
        evaluation_flops(tiny_lanes.CONFIG, targets, {"llm": 2}, SHAPE)


def test_a_lane_step_of_the_demo_costs_at_most_five_percent_over_the_minimum():
    demo = xla_flops.demo().with_depth(1, 1)
    assert xla_flops.count(xla_flops.compile_step(demo, **QUICK))["xla"] <= 1.05 * demo.minimum()["total"]
