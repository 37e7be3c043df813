"""The model families, by their configuration.

To add one: its configuration in `configs`, its model in a file here, its table in `hub`, its pictures in `data`, one
line in the registry of each, and a parity test with transformers.
"""

from mars_jax.models.configs import ModelConfig
from mars_jax.models.llava import Llava, LlavaOnevision
from mars_jax.models.multimodal import Multimodal
from mars_jax.models.qwen2_5_vl import Qwen25Vl

_MODELS: dict[str, type[Multimodal]] = {"llava": Llava, "llava_onevision": LlavaOnevision, "qwen2_5_vl": Qwen25Vl}


def build_model(config: ModelConfig, remat: str = "none") -> Multimodal:
    """The Linen module of an architecture; see `Multimodal`."""
    return _MODELS[config.family](config, remat)
