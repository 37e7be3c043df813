"""The registry of model families."""

from collections.abc import Callable

from mars_jax.errors import ConfigError
from mars_jax.models.configs import ModelConfig
from mars_jax.models.families.hf_json import Json
from mars_jax.models.families.llava import table as llava
from mars_jax.models.families.llava.config import read_llava, read_llava_onevision
from mars_jax.models.families.llava.model import Llava, LlavaOnevision
from mars_jax.models.families.qwen2_5_vl import table as qwen2_5_vl
from mars_jax.models.families.qwen2_5_vl.config import read_qwen2_5_vl
from mars_jax.models.families.qwen2_5_vl.model import Qwen25Vl
from mars_jax.models.families.tables import Family, Parameter
from mars_jax.models.multimodal import Multimodal

_MODELS: dict[str, type[Multimodal]] = {"llava": Llava, "llava_onevision": LlavaOnevision, "qwen2_5_vl": Qwen25Vl}


def build_model(config: ModelConfig, remat: str = "none") -> Multimodal:
    """The Linen module of an architecture; see `Multimodal`."""
    return _MODELS[config.family](config, remat)


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


def model_config(config: Json, source: str = "config.json") -> ModelConfig:
    """Reads a `config.json` dictionary of any supported family, written by transformers 4 or 5.

    Args:
        config: the parsed file.
        source: where it came from, for error messages.

    Raises:
        ConfigError: another model family, or a setting that this version does not implement.
    """
    family = config.get("model_type")
    if family not in _READERS:
        raise ConfigError(
            f"{source}: model_type is {family!r}, which is not supported. Supported families: "
            f"{', '.join(_READERS)}. Point model.checkpoint at a checkpoint of one of them."
        )
    return _READERS[family](config, source)


_READERS: dict[str, Callable[[Json, str], ModelConfig]] = {
    "llava": read_llava,
    "llava_onevision": read_llava_onevision,
    "qwen2_5_vl": read_qwen2_5_vl,
}
