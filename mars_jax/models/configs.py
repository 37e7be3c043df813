"""Architecture descriptions as frozen dataclasses, read from Hugging Face `config.json` dictionaries of either era.

They hold what the Flax modules need and nothing about training, sharding or files.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from mars_jax.errors import ConfigError

Json = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class VisionConfig:
    """A SigLIP vision encoder."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    image_size: int
    patch_size: int
    activation: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6

    @property
    def grid_size(self) -> int:
        """Patches along one side of a tile."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """Patches of one tile, P."""
        return self.grid_size**2


@dataclass(frozen=True, slots=True)
class QwenVisionConfig:
    """The vision encoder of Qwen2.5-VL, which sees a picture of any size as windows; a window is its tile."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    patch_size: int
    temporal_patch_size: int
    merge_size: int
    window_size: int
    full_attention_layers: tuple[int, ...]
    activation: str = "silu"
    rms_norm_eps: float = 1e-6

    @property
    def window_groups(self) -> int:
        """Groups of `merge_size` x `merge_size` patches, each one image token, along one side of a window."""
        return self.window_size // self.merge_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """Patches of one window, P."""
        return (self.window_groups * self.merge_size) ** 2

    @property
    def head_dim(self) -> int:
        """Numbers of a head."""
        return self.hidden_size // self.num_heads

    @property
    def patch_values(self) -> int:
        """Numbers of one patch: channels, moments, rows and columns of pixels."""
        return 3 * self.temporal_patch_size * self.patch_size**2


@dataclass(frozen=True, slots=True)
class TextConfig:
    """A Qwen2 decoder.

    `mrope_section` says how many of the rotary frequencies turn with each axis of a position (time, row, column), as
    in Qwen2-VL (arXiv 2409.12191); None where positions have one axis.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    activation: str = "silu"
    mrope_section: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class LlavaOnevisionConfig:
    """A SigLIP encoder and a Qwen2 decoder joined by a two-layer projector."""

    family: ClassVar[str] = "llava_onevision"

    vision: VisionConfig
    text: TextConfig
    image_token_id: int
    image_grid_pinpoints: tuple[tuple[int, int], ...]
    vision_aspect_ratio: str = "anyres_max_9"
    vision_feature_layer: int = -1
    projector_activation: str = "gelu"
    projector_bias: bool = True

    @property
    def num_vision_layers_used(self) -> int:
        """Encoder layers that reach the projector: `vision_feature_layer` counts hidden states from the end."""
        layer = self.vision_feature_layer
        return self.vision.num_layers + 1 + layer if layer < 0 else layer

    @classmethod
    def from_hf(cls, config: Json, source: str = "config.json") -> "LlavaOnevisionConfig":
        """Reads a `config.json` dictionary written by transformers 4 or 5; arguments and errors as `model_config`."""
        text, vision = _parts(config, source, _TEXT_KEYS, _VISION_KEYS)
        _require(source, "text_config.model_type", text.get("model_type", "qwen2"), ("qwen2",))
        _require(source, "vision_config.model_type", vision.get("model_type"), ("siglip_vision_model",))
        strategy = config.get("vision_feature_select_strategy", "full")
        _require(source, "vision_feature_select_strategy", strategy, ("full",))
        layer = config.get("vision_feature_layer", -1)
        if not isinstance(layer, int):
            raise ConfigError(
                f"{source}: vision_feature_layer is {layer!r}; this version takes one layer, given as an integer."
            )
        tied = config.get("tie_word_embeddings") or text.get("tie_word_embeddings", False)
        pinpoints = config.get("image_grid_pinpoints") or _DEFAULT_PINPOINTS
        return cls(
            vision=VisionConfig(
                hidden_size=vision["hidden_size"],
                intermediate_size=vision["intermediate_size"],
                num_layers=vision["num_hidden_layers"],
                num_heads=vision["num_attention_heads"],
                image_size=vision["image_size"],
                patch_size=vision["patch_size"],
                activation=vision.get("hidden_act", "gelu_pytorch_tanh"),
                layer_norm_eps=vision.get("layer_norm_eps", 1e-6),
            ),
            text=_text_config(text, source, tied=bool(tied)),
            image_token_id=_image_token(config, source, 151646),
            image_grid_pinpoints=tuple((int(height), int(width)) for height, width in pinpoints),
            vision_aspect_ratio=config.get("vision_aspect_ratio", "anyres_max_9"),
            vision_feature_layer=layer,
            projector_activation=config.get("projector_hidden_act", "gelu"),
            projector_bias=config.get("multimodal_projector_bias", True),
        )


@dataclass(frozen=True, slots=True)
class Qwen25VlConfig:
    """Qwen2.5-VL (arXiv 2502.13923): its window-attention encoder, a patch merger, and a Qwen2 decoder with M-RoPE."""

    family: ClassVar[str] = "qwen2_5_vl"

    vision: QwenVisionConfig
    text: TextConfig
    image_token_id: int

    @property
    def num_vision_layers_used(self) -> int:
        """All of them."""
        return self.vision.num_layers

    @classmethod
    def from_hf(cls, config: Json, source: str = "config.json") -> "Qwen25VlConfig":
        """Reads a `config.json` dictionary; arguments and errors as `model_config`.

        Hub files hold the decoder's settings at the top, those that transformers 5 writes in `text_config`.
        """
        if not isinstance(config.get("text_config"), Mapping):
            config = {**config, "text_config": {key: value for key, value in config.items() if key != "vision_config"}}
        text, vision = _parts(config, source, _TEXT_KEYS, _QWEN_VISION_KEYS)
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
        return cls(
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


ModelConfig = LlavaOnevisionConfig | Qwen25VlConfig

_READERS: dict[str, Callable[[Json, str], ModelConfig]] = {
    family.family: family.from_hf for family in (LlavaOnevisionConfig, Qwen25VlConfig)
}


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


_TEXT_KEYS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_VISION_KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "image_size",
    "patch_size",
)
_QWEN_VISION_KEYS = (
    "hidden_size",
    "intermediate_size",
    "depth",
    "num_heads",
    "patch_size",
    "out_hidden_size",
    "fullatt_block_indexes",
)
_DEFAULT_PINPOINTS = tuple((384 * rows, 384 * columns) for rows in range(1, 7) for columns in range(1, 7))


def _parts(
    config: Json, source: str, text_keys: tuple[str, ...], vision_keys: tuple[str, ...]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings of decoder and encoder, both there and complete."""
    needed = {"text_config": text_keys, "vision_config": vision_keys}
    missing = [name for name in needed if not isinstance(config.get(name), Mapping)]
    missing += [f"{name}.{key}" for name, keys in needed.items() for key in keys if key not in config.get(name, keys)]
    if missing:
        raise ConfigError(
            f"{source}: {', '.join(missing)} is missing. Take the config.json that belongs to the checkpoint."
        )
    return dict(config["text_config"]), dict(config["vision_config"])


def _text_config(text: Json, source: str, *, tied: bool, mrope: bool = False) -> TextConfig:
    """A Qwen2 decoder's settings. transformers 5 writes `rope_parameters`, 4 `rope_theta` and `rope_scaling`."""
    heads = text["num_attention_heads"]
    head_dim = text.get("head_dim") or text["hidden_size"] // heads
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    _require(source, "text_config.rope_parameters.rope_type", kind, ("default", "mrope") if mrope else ("default",))
    section = tuple(rope.get("mrope_section") or (16, 24, 24)) if mrope else None
    if section and (len(section) != 3 or 2 * sum(section) != head_dim):
        raise ConfigError(
            f"{source}: mrope_section is {list(section)}; three numbers that add up to half the head size, "
            f"{head_dim // 2}, are expected."
        )
    _require(source, "text_config.use_sliding_window", text.get("use_sliding_window", False), (False, None))
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
