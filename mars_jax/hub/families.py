"""The tables of the model families, by a model's configuration."""

from mars_jax.hub import llava_onevision, qwen2_5_vl
from mars_jax.hub.tables import Family, Parameter
from mars_jax.models.configs import ModelConfig

_FAMILIES: dict[str, Family] = {"llava_onevision": llava_onevision.FAMILY, "qwen2_5_vl": qwen2_5_vl.FAMILY}


def family_of(config: ModelConfig) -> Family:
    """How the checkpoints of this model are stored."""
    return _FAMILIES[config.family]


def parameters(config: ModelConfig) -> tuple[Parameter, ...]:
    """Every parameter of this model, with its shape and hub keys."""
    return family_of(config).parameters(config)
