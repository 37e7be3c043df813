"""Architecture descriptions as frozen dataclasses, read from Hugging Face `config.json` dictionaries of either era.

They hold what the Flax modules need and nothing about training, sharding or files.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mars_jax.errors import ConfigError

SUPPORTED_FAMILIES = ("llava_onevision",)


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
class TextConfig:
    """A Qwen2 decoder."""

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


@dataclass(frozen=True, slots=True)
class LlavaOnevisionConfig:
    """A SigLIP encoder and a Qwen2 decoder joined by a two-layer projector."""

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
    def from_hf(cls, config: Mapping[str, Any], source: str = "config.json") -> "LlavaOnevisionConfig":
        """Reads a `config.json` dictionary written by transformers 4 or 5.

        Args:
            config: the parsed file.
            source: where it came from, for error messages.

        Raises:
            ConfigError: another model family, or a setting that this version does not implement.
        """
        family = config.get("model_type")
        if family not in SUPPORTED_FAMILIES:
            raise ConfigError(
                f"{source}: model_type is {family!r}, which is not supported. Supported families: "
                f"{', '.join(SUPPORTED_FAMILIES)}. Point model.checkpoint at a checkpoint of one of them."
            )
        missing = [name for name in ("text_config", "vision_config") if not isinstance(config.get(name), Mapping)]
        missing += [f"text_config.{key}" for key in _TEXT_KEYS if key not in config.get("text_config", _TEXT_KEYS)]
        missing += [
            f"vision_config.{key}" for key in _VISION_KEYS if key not in config.get("vision_config", _VISION_KEYS)
        ]
        if missing:
            raise ConfigError(
                f"{source}: {', '.join(missing)} is missing. Take the config.json that belongs to the checkpoint."
            )
        text, vision = dict(config["text_config"]), dict(config["vision_config"])
        _require(source, "text_config.model_type", text.get("model_type", "qwen2"), ("qwen2",))
        _require(source, "vision_config.model_type", vision.get("model_type"), ("siglip_vision_model",))
        strategy = config.get("vision_feature_select_strategy", "full")
        _require(source, "vision_feature_select_strategy", strategy, ("full",))
        _require(source, "text_config.use_sliding_window", text.get("use_sliding_window", False), (False, None))
        layer = config.get("vision_feature_layer", -1)
        if not isinstance(layer, int):
            raise ConfigError(
                f"{source}: vision_feature_layer is {layer!r}; this version takes one layer, given as an integer."
            )
        tied = config.get("tie_word_embeddings") or text.get("tie_word_embeddings", False)
        pinpoints = config.get("image_grid_pinpoints") or _DEFAULT_PINPOINTS
        heads = text["num_attention_heads"]
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
            text=TextConfig(
                vocab_size=text["vocab_size"],
                hidden_size=text["hidden_size"],
                intermediate_size=text["intermediate_size"],
                num_layers=text["num_hidden_layers"],
                num_heads=heads,
                num_kv_heads=text.get("num_key_value_heads") or heads,
                head_dim=text.get("head_dim") or text["hidden_size"] // heads,
                rope_theta=_rope_theta(text, source),
                rms_norm_eps=text.get("rms_norm_eps", 1e-6),
                tie_word_embeddings=bool(tied),
                activation=text.get("hidden_act", "silu"),
            ),
            image_token_id=config.get("image_token_index", config.get("image_token_id", 151646)),
            image_grid_pinpoints=tuple((int(height), int(width)) for height, width in pinpoints),
            vision_aspect_ratio=config.get("vision_aspect_ratio", "anyres_max_9"),
            vision_feature_layer=layer,
            projector_activation=config.get("projector_hidden_act", "gelu"),
            projector_bias=config.get("multimodal_projector_bias", True),
        )


_LAYER_KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_TEXT_KEYS = ("vocab_size", *_LAYER_KEYS)
_VISION_KEYS = (*_LAYER_KEYS, "image_size", "patch_size")
_DEFAULT_PINPOINTS = tuple((384 * rows, 384 * columns) for rows in range(1, 7) for columns in range(1, 7))


def _require(source: str, key: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        choices = ", ".join(repr(choice) for choice in allowed)
        raise ConfigError(f"{source}: {key} is {value!r}; this version supports {choices}.")


def _rope_theta(text: Mapping[str, Any], source: str) -> float:
    """transformers 5 writes `rope_parameters`, transformers 4 `rope_theta` and `rope_scaling`."""
    parameters = text.get("rope_parameters") or text.get("rope_scaling") or {}
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    _require(source, "text_config.rope_parameters.rope_type", kind, ("default",))
    return float(parameters.get("rope_theta", text.get("rope_theta", 10_000.0)))
