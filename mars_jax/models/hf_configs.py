"""Reads architectures from Hugging Face `config.json` dictionaries, as transformers 4 or 5 writes them."""

from collections.abc import Callable, Mapping
from typing import Any

from mars_jax.errors import ConfigError
from mars_jax.models.configs import (
    LlavaConfig,
    LlavaOnevisionConfig,
    ModelConfig,
    Qwen25VlConfig,
    QwenVisionConfig,
    TextConfig,
    VisionConfig,
)

Json = Mapping[str, Any]

_TEXT_KEYS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_VISION_KEYS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
_QWEN_VISION_KEYS = (
    "hidden_size",
    "intermediate_size",
    "depth",
    "num_heads",
    "patch_size",
    "out_hidden_size",
    "fullatt_block_indexes",
)
_ACTIVATIONS = {"siglip_vision_model": "gelu_pytorch_tanh", "clip_vision_model": "quick_gelu", "dinov2": "gelu"}
# What transformers leaves out of a file, being its defaults, by the part's `model_type`.
_BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 224}
_DEFAULTS: dict[Any, Json] = {
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
    # of the vision encoder, which has the family's name in older files
    "qwen2_5_vl": {
        "depth": 32,
        "hidden_size": 3584,
        "intermediate_size": 3420,
        "num_heads": 16,
        "patch_size": 14,
        "out_hidden_size": 3584,
        "fullatt_block_indexes": [7, 15, 23, 31],
    },
}
_DEFAULTS["qwen2_5_vl_vision"] = _DEFAULTS["qwen2_5_vl"]
_DEFAULTS["qwen2_5_vl_text"] = {"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e6}
_DEFAULT_PINPOINTS = tuple((384 * rows, 384 * columns) for rows in range(1, 7) for columns in range(1, 7))


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


def _llava(config: Json, source: str) -> LlavaConfig:
    kinds, strategies = ("clip_vision_model", "siglip_vision_model", "dinov2"), ("default", "full")
    parts = _llava_parts(config, source, "llama", kinds, strategies, strategy="default", layer=-2, token=32000)
    return LlavaConfig(**parts)


def _llava_onevision(config: Json, source: str) -> LlavaOnevisionConfig:
    pinpoints = config.get("image_grid_pinpoints") or _DEFAULT_PINPOINTS
    kinds = ("siglip_vision_model",)
    return LlavaOnevisionConfig(
        **_llava_parts(config, source, "qwen2", kinds, ("full",), strategy="full", layer=-1, token=151646),
        image_grid_pinpoints=tuple((int(height), int(width)) for height, width in pinpoints),
        vision_aspect_ratio=config.get("vision_aspect_ratio", "anyres_max_9"),
    )


def _qwen2_5_vl(config: Json, source: str) -> Qwen25VlConfig:
    """Hub files hold the decoder's settings at the top, those that transformers 5 writes in `text_config`."""
    if not isinstance(config.get("text_config"), Mapping):
        config = {**config, "text_config": {key: value for key, value in config.items() if key != "vision_config"}}
    text, vision = _parts(config, source, ("qwen2_5_vl_text", "qwen2_5_vl"), _TEXT_KEYS, _QWEN_VISION_KEYS)
    tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
    decoder = _text_config(text, source, tied=bool(tied), mrope=True)
    merge, patch = vision.get("spatial_merge_size", 2), vision["patch_size"]
    window = vision.get("window_size", 112)
    _require(source, "vision_config.out_hidden_size", vision["out_hidden_size"], (decoder.hidden_size,))
    channels = vision.get("in_channels", vision.get("in_chans", 3))
    _require(source, "vision_config.in_channels", channels, (3,))
    if window % (merge * patch):
        raise ConfigError(
            f"{source}: vision_config.window_size is {window}; it must be a multiple of patch_size x "
            f"spatial_merge_size = {merge * patch}."
        )
    return Qwen25VlConfig(
        vision=QwenVisionConfig(
            hidden_size=vision["hidden_size"],
            intermediate_size=vision["intermediate_size"],
            num_layers=vision["depth"],
            num_heads=vision["num_heads"],
            patch_size=patch,
            temporal_patch_size=vision.get("temporal_patch_size", 2),
            merge_size=merge,
            window_size=window,
            full_attention_layers=tuple(vision["fullatt_block_indexes"]),
            activation=vision.get("hidden_act", "silu"),
        ),
        text=decoder,
        image_token_id=_image_token(config, source, 151655),
    )


def _parts(
    config: Json, source: str, kinds: tuple[str, str], text_keys: tuple[str, ...], vision_keys: tuple[str, ...]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings of decoder and encoder, both there and complete; `kinds` are theirs where the file doesn't say."""
    for name, kind in zip(("text_config", "vision_config"), kinds, strict=True):
        part = config.get(name)
        if isinstance(part, Mapping):
            part = {"model_type": kind, **part}
            # The decoder of a flat file has the name of the family; defaults by that are the encoder's.
            flat = name == "text_config" and part["model_type"] == "qwen2_5_vl"
            config = {**config, name: {**_DEFAULTS.get("qwen2_5_vl_text" if flat else part["model_type"], {}), **part}}
    needed = {"text_config": text_keys, "vision_config": vision_keys}
    missing = [name for name in needed if not isinstance(config.get(name), Mapping)]
    missing += [f"{name}.{key}" for name, keys in needed.items() for key in keys if key not in config.get(name, keys)]
    if missing:
        raise ConfigError(
            f"{source}: {', '.join(missing)} is missing. Take the config.json that belongs to the checkpoint."
        )
    return dict(config["text_config"]), dict(config["vision_config"])


def _llava_parts(
    config: Json,
    source: str,
    decoder: str,
    kinds: tuple[str, ...],
    strategies: tuple[str, ...],
    *,
    strategy: str,
    layer: int,
    token: int,
) -> dict[str, Any]:
    """What the LLaVA families have in common, as arguments of their configurations.

    Args:
        config: the parsed file.
        source: where it came from.
        decoder: the one where the file doesn't say.
        kinds: the encoders that are supported, first the one where the file doesn't say.
        strategies: those of `vision_feature_select_strategy` that are supported.
        strategy: the default.
        layer: the default of `vision_feature_layer`.
        token: the default of `image_token_index`.
    """
    text, vision = _parts(config, source, (decoder, kinds[0]), _TEXT_KEYS, _VISION_KEYS)
    chosen = config.get("vision_feature_select_strategy", strategy)
    _require(source, "vision_feature_select_strategy", chosen, strategies)
    layers = config.get("vision_feature_layer", layer)
    layers = [layers] if isinstance(layers, int) else layers
    count = vision["num_hidden_layers"]
    if not (isinstance(layers, list) and layers and all(isinstance(n, int) and abs(n) <= count for n in layers)):
        raise ConfigError(
            f"{source}: vision_feature_layer is {layers!r}; one or more of the hidden states {-count} to {count} are "
            "expected."
        )
    tied = config.get("tie_word_embeddings") or text.get("tie_word_embeddings", False)
    return {
        "vision": _vision_config(vision, source, kinds),
        "text": _text_config(text, source, tied=bool(tied)),
        "image_token_id": _image_token(config, source, token),
        "vision_feature_layers": tuple(n if n >= 0 else count + 1 + n for n in layers),
        "drop_first": chosen == "default",
        "projector_activation": config.get("projector_hidden_act", "gelu"),
        "projector_bias": config.get("multimodal_projector_bias", True),
    }


def _vision_config(vision: Json, source: str, kinds: tuple[str, ...]) -> VisionConfig:
    kind = vision.get("model_type")
    _require(source, "vision_config.model_type", kind, kinds)
    if kind == "dinov2":
        for key, expected in (("use_swiglu_ffn", False), ("qkv_bias", True)):
            _require(source, f"vision_config.{key}", vision.get(key, expected), (expected,))
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


def _text_config(text: Json, source: str, *, tied: bool, mrope: bool = False) -> TextConfig:
    """A decoder's settings. transformers 5 writes `rope_parameters`, 4 `rope_theta` and `rope_scaling`."""
    kinds = ("qwen2_5_vl_text", "qwen2_5_vl") if mrope else ("qwen2", "llama")
    kind = text["model_type"]
    _require(source, "text_config.model_type", kind, kinds)
    heads = text["num_attention_heads"]
    head_dim = text.get("head_dim") or text["hidden_size"] // heads
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    rope_kind = rope.get("rope_type", rope.get("type", "default"))
    allowed = ("default", "mrope") if mrope else ("default",)
    _require(source, "text_config.rope_parameters.rope_type", rope_kind, allowed)
    section = tuple(rope.get("mrope_section") or (16, 24, 24)) if mrope else None
    if section and (len(section) != 3 or 2 * sum(section) != head_dim):
        raise ConfigError(
            f"{source}: mrope_section is {list(section)}; three numbers that add up to half the head size, "
            f"{head_dim // 2}, are expected."
        )
    for key in ("use_sliding_window", "mlp_bias") + (("attention_bias",) if kind == "llama" else ()):
        _require(source, f"text_config.{key}", text.get(key, False), (False, None))
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


def _image_token(config: Json, source: str, default: int) -> int:
    """LLaVA's files and older ones say `image_token_index`, others `image_token_id`."""
    for key in ("image_token_index", "image_token_id"):
        if key in config:
            if not isinstance(config[key], int):
                raise ConfigError(f"{source}: {key} is {config[key]!r}; the id of the image token is expected.")
            return int(config[key])
    return default


def _require(source: str, key: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        choices = ", ".join(repr(choice) for choice in allowed)
        raise ConfigError(f"{source}: {key} is {value!r}; this version supports {choices}.")


_READERS: dict[str, Callable[[Json, str], ModelConfig]] = {
    "llava": _llava,
    "llava_onevision": _llava_onevision,
    "qwen2_5_vl": _qwen2_5_vl,
}
