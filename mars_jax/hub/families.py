"""The tables of the model families, by a model's configuration."""

from mars_jax.hub import llava, qwen2_5_vl
from mars_jax.hub.tables import Family, Parameter
from mars_jax.models.configs import ModelConfig

_FAMILIES: dict[str, Family] = {
    "llava clip_vision_model": llava.WITH_CLIP,
    "llava dinov2": llava.WITH_DINOV2,
    "llava siglip_vision_model": llava.WITH_SIGLIP,
    "llava_onevision siglip_vision_model": llava.ONEVISION,
    "qwen2_5_vl": qwen2_5_vl.FAMILY,
}


def family_of(config: ModelConfig) -> Family:
    """How the checkpoints of this model are stored."""
    kind = getattr(config.vision, "kind", "")
    return _FAMILIES[f"{config.family} {kind}".strip()]


def parameters(config: ModelConfig) -> tuple[Parameter, ...]:
    """Every parameter of this model, with its shape and hub keys."""
    return family_of(config).parameters(config)
