"""Shardings of the parameters of every architecture.

A column-parallel linear splits its output over `tensor`, a row-parallel one its input, so that a pair of them
communicates once (Shoeybi et al., arXiv 1909.08053); `fsdp` splits the other dimension.
"""

from jax.sharding import Mesh

from mars_jax.models.configs import ModelConfig
from mars_jax.models.families.registry import family_of, parameters
from mars_jax.runtime.sharding import Rule, split_by_rules
from mars_jax.runtime.trees import Tree

_COLUMN = r".*/(q_proj|k_proj|v_proj|gate_proj|up_proj|fc1|linear_1)"
_ROW = r".*/(o_proj|out_proj|proj|down_proj|fc2|linear_2)"
_NORM = r"(pre|input|post_attention)_layernorm|layer_norm[12]|layer_scale[12]|norm[12]?"

RULES: tuple[Rule, ...] = (
    (rf"{_COLUMN}/kernel", ("fsdp", "tensor")),
    (rf"{_COLUMN}/bias", ("tensor",)),
    (rf"{_ROW}/kernel", ("tensor", "fsdp")),
    (rf"{_ROW}/bias", (None,)),
    # A fused linear is not split over `tensor`, which would mix queries, keys and values in a shard.
    (r".*/qkv/kernel", ("fsdp", None)),
    (r".*/qkv/bias", (None,)),
    # Rows are looked up, so both axes split the columns. (With rows over `tensor` and columns over `fsdp`, the XLA of
    # jaxlib 0.10.1 ends the process where the mesh has a lane axis too: a failed check in spmd_partitioner_util.cc.)
    (r"llm/embed_tokens/embedding", (None, ("fsdp", "tensor"))),
    (r"llm/lm_head/kernel", ("fsdp", "tensor")),
    (r"vision/(patch_embed/kernel|position_embed)", (None, None)),
    (r"vision/patch_embed/bias|vision/class_embed", (None,)),
    (rf".*/({_NORM})/(scale|bias)", (None,)),
)
"""Rules for parameters shared by several families; a family adds rules for its other parameters."""


def base_shardings(config: ModelConfig, mesh: Mesh) -> Tree:
    """The sharding of every parameter of a base.

    Args:
        config: the architecture.
        mesh: mesh of `runtime.sharding.make_mesh`.

    Returns:
        The parameter tree, with a `NamedSharding` as each leaf.

    Raises:
        ConfigError: parameters have no rule, or dimensions are not divisible by their mesh axes; all are listed.
    """
    shapes = {parameter.path: parameter.shape for parameter in parameters(config)}
    return split_by_rules(shapes, mesh, (*family_of(config).shardings, *RULES))
