"""Registry of model families, and functions of a configuration that its family implements.

How to add a family:

1. Make the folder `mars_jax/models/families/NAME`; `qwen2_5_vl` is an example of
   - `config.py`: frozen dataclasses that are a `ModelConfig` and an `EncoderConfig` (`models/configs.py`), and the
     function that reads them from config.json with the functions of `hf_json.py`;
   - `model.py`: a subclass of `Multimodal` with the modules `vision`, `projector` and `llm`;
   - `table.py`: the `CheckpointTable`, a row for every parameter. Layers are in `vision/layers` and `llm/layers`, and
     linears have the names in `models/flops.py` and `models/shardings.py` (`q_proj`, `fc1`, `linear_1`, ...);
   - a `Pictures` (`pictures.py`), which converts pictures to tiles and image tokens;
   - `family.py`: the `Family`, which combines these.
2. Add a line to `FAMILIES` below. A family outside the package calls `FAMILIES.register(family)` instead.
3. Add a tiny config.json and image processor to `BASES` in benchmarks/compat/adapter_bases.py: the tests of the
   registry and the adapter matrix run over them. Compare logits and LoRA gradients with transformers and PEFT in a
   separate test, as tests/models/families/test_qwen2_5_vl.py does.
"""

from mars_jax.errors import ConfigError
from mars_jax.models.configs import ModelConfig
from mars_jax.models.families.base import Family
from mars_jax.models.families.hf_json import Json
from mars_jax.models.families.tables import CheckpointTable, Parameter
from mars_jax.models.multimodal import Multimodal
from mars_jax.runtime.registry import Registry

FAMILIES: Registry[Family[ModelConfig]] = Registry(
    "model family",
    {
        "llava": "mars_jax.models.families.llava.family:LLAVA",
        "llava_onevision": "mars_jax.models.families.llava.family:LLAVA_ONEVISION",
        "qwen2_5_vl": "mars_jax.models.families.qwen2_5_vl.family:FAMILY",
    },
)


def model_config(config: Json, source: str = "config.json") -> ModelConfig:
    """Reads a `config.json` dictionary of any supported family, written by transformers 4 or 5.

    Args:
        config: the parsed file.
        source: path of the file, for error messages.

    Raises:
        ConfigError: the family is not supported, or a setting is not implemented.
    """
    name = config.get("model_type")
    if name not in FAMILIES.names:
        raise ConfigError(
            f"{source}: model_type is {name!r}, which is not supported. Supported families: "
            f"{', '.join(FAMILIES.names)}. Point model.checkpoint at a checkpoint of one of them."
        )
    return FAMILIES[name].read_config(config, source)


def family_of(config: ModelConfig) -> Family[ModelConfig]:
    """The family of an architecture."""
    return FAMILIES[config.family]


def build_model(config: ModelConfig, remat: str = "none") -> Multimodal:
    """The Linen module of an architecture; see `Multimodal`."""
    return family_of(config).model(config, remat)


def checkpoint_table(config: ModelConfig) -> CheckpointTable[ModelConfig]:
    """The checkpoint table of an architecture."""
    return family_of(config).table(config)


def parameters(config: ModelConfig) -> tuple[Parameter, ...]:
    """Every parameter of an architecture, with its shape and hub keys."""
    return checkpoint_table(config).parameters(config)
