"""Configurations of LLaVA-1.5 and LLaVA-OneVision."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self, TypedDict

from mars_jax.errors import ConfigError
from mars_jax.models.configs import TextConfig, VisionConfig
from mars_jax.models.families.hf_json import (
    TEXT_KEYS,
    VISION_KEYS,
    Json,
    Part,
    read_image_token,
    read_parts,
    read_text_config,
    read_vision_config,
    require,
)


@dataclass(frozen=True, slots=True)
class LlavaConfig:
    """LLaVA-1.5 (arXiv 2310.03744) and variants: an encoder and a decoder joined by a two-layer projector.

    Attributes:
        vision_feature_layers: indices of the hidden states that are concatenated for the projector; 0: the embeddings.
        drop_first: whether the first token of a tile gives no image token: `vision_feature_select_strategy` "default".
    """

    family: ClassVar[str] = "llava"

    vision: VisionConfig
    text: TextConfig
    image_token_id: int
    vision_feature_layers: tuple[int, ...]
    drop_first: bool = False
    projector_activation: str = "gelu"
    projector_bias: bool = True

    @property
    def num_vision_layers_used(self) -> int:
        """Number of encoder layers whose output reaches the projector."""
        return max(self.vision_feature_layers)

    @property
    def feature_width(self) -> int:
        """Width of the concatenated hidden states."""
        return self.vision.hidden_size * len(self.vision_feature_layers)

    @property
    def trimmed_settings(self) -> Mapping[str, object]:
        """The number of layers in use, and the indices of hidden states counted from the first."""
        layers = list(self.vision_feature_layers)
        return {
            "vision_config.num_hidden_layers": self.num_vision_layers_used,
            "vision_feature_layer": layers if len(layers) > 1 else layers[0],
        }

    def with_all_vision_layers(self) -> Self:
        """The same architecture, with the last hidden state in use."""
        return replace(self, vision_feature_layers=(self.vision.num_layers,))


@dataclass(frozen=True, slots=True)
class LlavaOnevisionConfig(LlavaConfig):
    """LLaVA-OneVision (arXiv 2408.03326): as LLaVA, with pictures cut into tiles and a newline vector."""

    family: ClassVar[str] = "llava_onevision"

    image_grid_pinpoints: tuple[tuple[int, int], ...] = ()
    vision_aspect_ratio: str = "anyres_max_9"


_DEFAULT_PINPOINTS = tuple((384 * rows, 384 * columns) for rows in range(1, 7) for columns in range(1, 7))


def read_llava(config: Json, source: str) -> LlavaConfig:
    """Reads the `config.json` of a LLaVA-1.5."""
    kinds, strategies = ("clip_vision_model", "siglip_vision_model", "dinov2"), ("default", "full")
    common = _common_settings(config, source, "llama", kinds, strategies, strategy="default", layer=-2, token=32000)
    return LlavaConfig(**common)


def read_llava_onevision(config: Json, source: str) -> LlavaOnevisionConfig:
    """Reads the `config.json` of a LLaVA-OneVision."""
    pinpoints = config.get("image_grid_pinpoints") or _DEFAULT_PINPOINTS
    kinds = ("siglip_vision_model",)
    return LlavaOnevisionConfig(
        **_common_settings(config, source, "qwen2", kinds, ("full",), strategy="full", layer=-1, token=151646),
        image_grid_pinpoints=tuple((int(height), int(width)) for height, width in pinpoints),
        vision_aspect_ratio=config.get("vision_aspect_ratio", "anyres_max_9"),
    )


class _CommonSettings(TypedDict):
    """Arguments that the configurations of all LLaVA families have."""

    vision: VisionConfig
    text: TextConfig
    image_token_id: int
    vision_feature_layers: tuple[int, ...]
    drop_first: bool
    projector_activation: str
    projector_bias: bool


def _common_settings(
    config: Json,
    source: str,
    decoder: str,
    kinds: tuple[str, ...],
    strategies: tuple[str, ...],
    *,
    strategy: str,
    layer: int,
    token: int,
) -> _CommonSettings:
    """Reads the settings that the LLaVA families have in common.

    Args:
        config: the parsed file.
        source: path of the file, for error messages.
        decoder: default `model_type` of the decoder.
        kinds: supported encoders, by `model_type`; the first is the default.
        strategies: supported values of `vision_feature_select_strategy`.
        strategy: default of `vision_feature_select_strategy`.
        layer: default of `vision_feature_layer`.
        token: default of `image_token_index`.
    """
    text, vision = read_parts(config, source, Part(decoder, TEXT_KEYS), Part(kinds[0], VISION_KEYS))
    strategy = config.get("vision_feature_select_strategy", strategy)
    require(source, "vision_feature_select_strategy", strategy, strategies)
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
        "vision": read_vision_config(vision, source, kinds),
        "text": read_text_config(text, source, tied=bool(tied)),
        "image_token_id": read_image_token(config, source, token),
        "vision_feature_layers": tuple(n if n >= 0 else count + 1 + n for n in layers),
        "drop_first": strategy == "default",
        "projector_activation": config.get("projector_hidden_act", "gelu"),
        "projector_bias": config.get("multimodal_projector_bias", True),
    }
