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

import re
from collections.abc import Mapping

from mars_jax.errors import ConfigError
from mars_jax.models.configs import ModelConfig
from mars_jax.models.families.base import Family
from mars_jax.models.families.hf_json import Json
from mars_jax.models.families.tables import CheckpointTable, Parameter
from mars_jax.models.multimodal import Multimodal
from mars_jax.runtime.json_object import belongs, shown
from mars_jax.runtime.registry import Registry

FAMILIES: Registry[Family[ModelConfig]] = Registry(
    "model family",
    {
        "llava": "mars_jax.models.families.llava.family:LLAVA",
        "llava_onevision": "mars_jax.models.families.llava.family:LLAVA_ONEVISION",
        "qwen2_5_vl": "mars_jax.models.families.qwen2_5_vl.family:FAMILY",
    },
)


# Of LLaVA's own code, which transformers' models are converted from.
_ORIGINAL_LLAVA = re.compile(r"Llava\w*ForCausalLM|llava_(?!onevision$|next$|next_video$)\w+")
_QUANTISATION_KEYS = ("quantization_config", "compression_config")


def model_config(config: Json, source: str = "config.json") -> ModelConfig:
    """Reads a `config.json` dictionary of any supported family, written by transformers 4 or 5.

    Args:
        config: the parsed file.
        source: path of the file, for error messages.

    Raises:
        ConfigError: the family or the format is not supported, the weights are quantised, or a setting is not possible
            or not implemented.
    """
    _refuse_original_llava(config, source)
    name = config.get("model_type")
    if name not in FAMILIES.names:
        architectures = ", ".join(_architectures(config))
        raise ConfigError(
            f"{source}: model_type is {shown(name)}{f' ({architectures})' if architectures else ''}, which is not "
            f"supported. Supported families: {', '.join(FAMILIES.names)}. Point model.checkpoint at a checkpoint of "
            "one of them."
        )
    _refuse_quantised(config, source)
    found = FAMILIES[name].read_config(config, source)
    if found.image_token_id >= found.text.vocab_size:
        raise ConfigError(
            f"{source}: the image token is {found.image_token_id}, but the embedding has {found.text.vocab_size} rows "
            f"(vocab_size). {belongs(source)}"
        )
    return found


def _architectures(config: Json) -> list[str]:
    names = config.get("architectures")
    return [name for name in names if isinstance(name, str)][:3] if isinstance(names, list) else []


def _refuse_original_llava(config: Json, source: str) -> None:
    """Refuses checkpoints in the format of LLaVA's own code."""
    names = [*_architectures(config), config.get("model_type")]
    original = [name for name in names if isinstance(name, str) and _ORIGINAL_LLAVA.fullmatch(name)]
    has_own_keys = "mm_vision_tower" in config and "vision_config" not in config
    if (original or has_own_keys) and not any(name in FAMILIES.names for name in original):
        raise ConfigError(
            f"{source}: original LLaVA format ({original[0] if original else 'mm_vision_tower'}), which is not read. "
            "Take the -hf conversion of this checkpoint, such as llava-hf/llava-1.5-7b-hf or "
            "llava-hf/llava-onevision-qwen2-7b-ov-hf on the hub."
        )


def _refuse_quantised(config: Json, source: str) -> None:
    parts = (config, config.get("text_config"), config.get("vision_config"))
    for part in [part for part in parts if isinstance(part, Mapping)]:
        for key in _QUANTISATION_KEYS:
            settings = part.get(key)
            if settings is not None:
                method = _method(settings)
                raise ConfigError(
                    f"{source}: {key} is there: the weights are quantised ({method}), which is not read. Take the "
                    "checkpoint that they were quantised from, in bfloat16, float16 or float32."
                )


def _method(settings: object) -> str:
    """The method of quantisation that a `quantization_config` names."""
    if isinstance(settings, Mapping):
        if isinstance(settings.get("quant_method"), str):
            return str(settings["quant_method"])[:40]
        if "load_in_4bit" in settings or "load_in_8bit" in settings:
            return "bitsandbytes"
    return "by an unknown method"


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
