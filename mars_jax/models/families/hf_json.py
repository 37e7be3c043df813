"""Reads architectures from Hugging Face `config.json` dictionaries written by transformers 4 or 5."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mars_jax.errors import ConfigError
from mars_jax.models.configs import TextConfig, VisionConfig

Json = Mapping[str, Any]
"""A parsed JSON object, read only."""

TEXT_KEYS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
VISION_KEYS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")

_ACTIVATIONS = {"siglip_vision_model": "gelu_pytorch_tanh", "clip_vision_model": "quick_gelu", "dinov2": "gelu"}
# Defaults that transformers omits from files, by `model_type`, for parts that several families share.
_BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 224}
_DEFAULTS: dict[str, Json] = {
    "llama": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "qwen2": {
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "siglip_vision_model": {**_BASE, "intermediate_size": 3072, "patch_size": 16},
    "clip_vision_model": {**_BASE, "intermediate_size": 3072, "patch_size": 32},
    "dinov2": {**_BASE, "patch_size": 14},
}


@dataclass(frozen=True, slots=True)
class Part:
    """Requirements of a family on `text_config` or `vision_config`.

    Attributes:
        kind: its default `model_type`.
        keys: required settings, in the file or among the defaults.
        defaults: `model_type` -> settings that a file may omit, for parts that only this family has.
    """

    kind: str
    keys: tuple[str, ...]
    defaults: Mapping[str, Json] = field(default_factory=dict)


def read_parts(config: Json, source: str, text: Part, vision: Part) -> tuple[Json, Json]:
    """The settings of decoder and encoder, completed with defaults.

    Args:
        config: the parsed file.
        source: its path, for error messages.
        text: requirements on the decoder's part.
        vision: requirements on the encoder's part.

    Raises:
        ConfigError: a part or a setting is missing.
    """
    parts = {"text_config": text, "vision_config": vision}
    for name, part in parts.items():
        settings = config.get(name)
        if isinstance(settings, Mapping):
            kind = settings.get("model_type", part.kind)
            defaults = part.defaults.get(kind, _DEFAULTS.get(kind, {}))
            config = {**config, name: {**defaults, "model_type": kind, **settings}}
    missing = [name for name in parts if not isinstance(config.get(name), Mapping)]
    missing += [
        f"{name}.{key}" for name, part in parts.items() for key in part.keys if key not in config.get(name, part.keys)
    ]
    if missing:
        raise ConfigError(
            f"{source}: {', '.join(missing)} is missing. Take the config.json that belongs to the checkpoint."
        )
    return dict(config["text_config"]), dict(config["vision_config"])


def read_vision_config(vision: Json, source: str, kinds: tuple[str, ...]) -> VisionConfig:
    """Reads a vision transformer's settings; its `model_type` must be one of `kinds`."""
    kind = vision.get("model_type")
    require(source, "vision_config.model_type", kind, kinds)
    if kind == "dinov2":
        for key, expected in (("use_swiglu_ffn", False), ("qkv_bias", True)):
            require(source, f"vision_config.{key}", vision.get(key, expected), (expected,))
        width = int(vision["hidden_size"] * vision.get("mlp_ratio", 4))
    else:
        width = vision["intermediate_size"]
    return VisionConfig(
        hidden_size=vision["hidden_size"],
        intermediate_size=width,
        num_layers=vision["num_hidden_layers"],
        num_heads=vision["num_attention_heads"],
        image_size=vision["image_size"],
        patch_size=vision["patch_size"],
        kind=str(kind),
        activation=vision.get("hidden_act", _ACTIVATIONS[str(kind)]),
        layer_norm_eps=vision.get("layer_norm_eps", 1e-5 if kind == "clip_vision_model" else 1e-6),
    )


def read_text_config(
    text: Json, source: str, *, tied: bool, kinds: tuple[str, ...] = ("qwen2", "llama"), mrope: bool = False
) -> TextConfig:
    """Reads a decoder's settings. transformers 5 writes `rope_parameters`, 4 `rope_theta` and `rope_scaling`.

    Args:
        text: the part of the file, completed with defaults.
        source: path of the file, for error messages.
        tied: whether the head is the embedding.
        kinds: supported decoders, by `model_type`.
        mrope: whether rotary positions have three axes.

    Raises:
        ConfigError: a setting that this version does not implement.
    """
    kind = text["model_type"]
    require(source, "text_config.model_type", kind, kinds)
    heads = text["num_attention_heads"]
    head_dim = text.get("head_dim") or text["hidden_size"] // heads
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    rope_kind = rope.get("rope_type", rope.get("type", "default"))
    allowed = ("default", "mrope") if mrope else ("default",)
    require(source, "text_config.rope_parameters.rope_type", rope_kind, allowed)
    section = tuple(rope.get("mrope_section") or (16, 24, 24)) if mrope else None
    if section and (len(section) != 3 or 2 * sum(section) != head_dim):
        raise ConfigError(
            f"{source}: mrope_section is {list(section)}; three numbers that add up to half the head size, "
            f"{head_dim // 2}, are expected."
        )
    for key in ("use_sliding_window", "mlp_bias") + (("attention_bias",) if kind == "llama" else ()):
        require(source, f"text_config.{key}", text.get(key, False), (False, None))
    return TextConfig(
        vocab_size=text["vocab_size"],
        hidden_size=text["hidden_size"],
        intermediate_size=text["intermediate_size"],
        num_layers=text["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=text.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        rope_theta=float(rope.get("rope_theta") or text.get("rope_theta") or 10_000.0),
        rms_norm_eps=text.get("rms_norm_eps", 1e-6),
        tie_word_embeddings=tied,
        activation=text.get("hidden_act", "silu"),
        mrope_section=section,
        attention_bias=kind != "llama",
    )


def read_image_token(config: Json, source: str, default: int) -> int:
    """The id of the image token: `image_token_index` in LLaVA's and older files, `image_token_id` in others."""
    for key in ("image_token_index", "image_token_id"):
        if key in config:
            if not isinstance(config[key], int):
                raise ConfigError(f"{source}: {key} is {config[key]!r}; the id of the image token is expected.")
            return int(config[key])
    return default


def require(source: str, key: str, value: object, allowed: tuple[object, ...]) -> None:
    """Refuses a setting that this version does not implement.

    Raises:
        ConfigError: the value is not in `allowed`.
    """
    if value not in allowed:
        choices = ", ".join(repr(choice) for choice in allowed)
        raise ConfigError(f"{source}: {key} is {value!r}; this version supports {choices}.")
