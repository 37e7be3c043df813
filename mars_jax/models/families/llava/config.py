"""Configurations of LLaVA-1.5 and LLaVA-OneVision."""

from dataclasses import dataclass
from typing import Any, ClassVar

from mars_jax.errors import ConfigError
from mars_jax.models.configs import TextConfig, VisionConfig
from mars_jax.models.families.hf_json import (
    TEXT_KEYS,
    VISION_KEYS,
    Json,
    read_image_token,
    read_parts,
    read_text_config,
    read_vision_config,
    require,
)


@dataclass(frozen=True, slots=True)
class LlavaConfig:
    """LLaVA-1.5 (arXiv 2310.03744) and its kin: an encoder and a decoder joined by a two-layer projector.

    Attributes:
        vision_feature_layers: hidden states of the encoder that the projector reads side by side; 0: the embeddings.
        drop_first: whether image tokens leave out the first token of a tile, as the strategy "default" does.
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
        """Encoder layers that reach the projector."""
        return max(self.vision_feature_layers)


@dataclass(frozen=True, slots=True)
class LlavaOnevisionConfig(LlavaConfig):
    """The same, with pictures cut into tiles, and a learned vector at the end of a row of features."""

    family: ClassVar[str] = "llava_onevision"

    image_grid_pinpoints: tuple[tuple[int, int], ...] = ()
    vision_aspect_ratio: str = "anyres_max_9"


_DEFAULT_PINPOINTS = tuple((384 * rows, 384 * columns) for rows in range(1, 7) for columns in range(1, 7))


def read_llava(config: Json, source: str) -> LlavaConfig:
    """Reads the `config.json` of a LLaVA-1.5."""
    kinds, strategies = ("clip_vision_model", "siglip_vision_model", "dinov2"), ("default", "full")
    parts = _llava_parts(config, source, "llama", kinds, strategies, strategy="default", layer=-2, token=32000)
    return LlavaConfig(**parts)


def read_llava_onevision(config: Json, source: str) -> LlavaOnevisionConfig:
    """Reads the `config.json` of a LLaVA-OneVision."""
    pinpoints = config.get("image_grid_pinpoints") or _DEFAULT_PINPOINTS
    kinds = ("siglip_vision_model",)
    return LlavaOnevisionConfig(
        **_llava_parts(config, source, "qwen2", kinds, ("full",), strategy="full", layer=-1, token=151646),
        image_grid_pinpoints=tuple((int(height), int(width)) for height, width in pinpoints),
        vision_aspect_ratio=config.get("vision_aspect_ratio", "anyres_max_9"),
    )


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
    text, vision = read_parts(config, source, (decoder, kinds[0]), TEXT_KEYS, VISION_KEYS)
    chosen = config.get("vision_feature_select_strategy", strategy)
    require(source, "vision_feature_select_strategy", chosen, strategies)
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
        "drop_first": chosen == "default",
        "projector_activation": config.get("projector_hidden_act", "gelu"),
        "projector_bias": config.get("multimodal_projector_bias", True),
    }
