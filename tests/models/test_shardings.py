"""The rules for the parameters of models: which axes split what, and what no rule is for."""

import re
from pathlib import Path

import pytest
from jax.sharding import PartitionSpec as P

from mars_jax.errors import ConfigError
from mars_jax.hub.read import read_config
from mars_jax.models.families.registry import parameters
from mars_jax.models.shardings import RULES, base_shardings
from mars_jax.runtime.sharding import make_mesh, split_by_rules
from mars_jax.runtime.trees import flatten
from tests.helpers import tiny_lanes

DEMO_BASE = Path(__file__).parents[2] / "demo" / "base"


def test_the_rules_split_a_pair_of_linears_the_opposite_way_and_never_the_layers():
    mesh = make_mesh({"fsdp": 2, "tensor": 2, "data": -1})
    specs = {path: s.spec for path, s in flatten(base_shardings(tiny_lanes.CONFIG, mesh)).items()}
    assert specs["llm/layers/mlp/up_proj/kernel"] == P(None, "fsdp", "tensor")
    assert specs["llm/layers/mlp/down_proj/kernel"] == P(None, "tensor", "fsdp")
    assert specs["vision/layers/self_attn/q_proj/bias"] == P(None, "tensor")
    assert specs["vision/layers/mlp/fc2/bias"] == P(None, None)
    assert specs["projector/linear_1/kernel"] == P("fsdp", "tensor")
    assert specs["llm/embed_tokens/embedding"] == P(None, ("fsdp", "tensor"))
    assert specs["llm/lm_head/kernel"] == P("fsdp", "tensor")
    assert specs["image_newline"] == P(None)
    stacked = {path: spec for path, spec in specs.items() if "/layers/" in path}
    assert stacked
    assert all(spec[0] is None for spec in stacked.values())


def test_every_parameter_of_the_demo_has_a_rule_and_all_large_ones_are_split():
    mesh = make_mesh({"fsdp": 4, "lane": 2})
    config = read_config(DEMO_BASE)
    shapes = {parameter.path: parameter.shape for parameter in parameters(config)}
    shardings = flatten(base_shardings(config, mesh))
    assert shardings.keys() == shapes.keys()
    whole = {path for path, sharding in shardings.items() if sharding.is_fully_replicated}
    assert [path for path in whole if path.endswith("kernel")] == ["vision/patch_embed/kernel"]
    vectors = {path for path, shape in shapes.items() if len(shape) - ("/layers/" in path) == 1}
    assert whole == vectors | {"vision/patch_embed/kernel", "vision/position_embed"}


@pytest.mark.parametrize(
    ("path", "shape"),
    [("llm/layers/mlp/experts/kernel", (2, 8, 8)), ("llm/layers/mlp/up_proj/kernel", (8, 8)), ("extra", (8,))],
)
def test_a_parameter_without_a_rule_is_refused(path, shape):
    text = f"no rule matches the parameter {path} of shape {list(shape)}. Add one to the model family's shardings."
    with pytest.raises(ConfigError, match=re.escape(text)):
        split_by_rules({path: shape}, make_mesh({"lane": -1}), RULES)
