"""Configurations of LLaVA-1.5 and LLaVA-OneVision."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal, Self, TypedDict

from pydantic import Field

from mars_jax.models.configs import TextConfig, VisionConfig
from mars_jax.models.families.hf_json import (
    DECODERS,
    Activation,
    Json,
    TokenId,
    kind_of,
    read_text_config,
    read_vision_config,
)
from mars_jax.runtime.json_object import Settings, checked, refusal


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
    def around_pictures(self) -> None:
        """None: the family has no tokens before and after a picture."""
        return None

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


_HiddenState = Annotated[int, Field(ge=-1025, le=1024)]
_HiddenStates = _HiddenState | Annotated[list[_HiddenState], Field(min_length=1, max_length=64)]
_Side = Annotated[int, Field(ge=1, le=2**14)]
Pinpoints = Annotated[
    list[Annotated[list[_Side], Field(min_length=2, max_length=2)]], Field(min_length=1, max_length=1024)
]
"""Heights and widths of canvases."""


class LlavaFile(Settings):
    """The top level of the `config.json` of a LLaVA-1.5."""

    text_config: dict[str, Any]
    vision_config: dict[str, Any]
    image_token_index: TokenId = 32000
    image_token_id: TokenId | None = None
    vision_feature_layer: _HiddenStates = -2
    vision_feature_select_strategy: Literal["default", "full"] = "default"
    projector_hidden_act: Activation = "gelu"
    multimodal_projector_bias: bool = True
    tie_word_embeddings: bool | None = None


class OnevisionFile(LlavaFile):
    """The top level of the `config.json` of a LLaVA-OneVision."""

    image_token_index: TokenId = 151646
    vision_feature_layer: _HiddenStates = -1
    vision_feature_select_strategy: Literal["full"] = "full"
    image_grid_pinpoints: Pinpoints | None = None
    vision_aspect_ratio: Annotated[str, Field(max_length=64)] = "anyres_max_9"


_DEFAULT_PINPOINTS = tuple((384 * rows, 384 * columns) for rows in range(1, 7) for columns in range(1, 7))


def read_llava(config: Json, source: str) -> LlavaConfig:
    """Reads the `config.json` of a LLaVA-1.5."""
    file = checked(LlavaFile, config, source)
    kinds = ("clip_vision_model", "siglip_vision_model", "dinov2")
    return LlavaConfig(**_common_settings(file, source, "llama", kinds))


def read_llava_onevision(config: Json, source: str) -> LlavaOnevisionConfig:
    """Reads the `config.json` of a LLaVA-OneVision."""
    file = checked(OnevisionFile, config, source)
    pinpoints = file.image_grid_pinpoints or _DEFAULT_PINPOINTS
    return LlavaOnevisionConfig(
        **_common_settings(file, source, "qwen2", ("siglip_vision_model",)),
        image_grid_pinpoints=tuple((height, width) for height, width in pinpoints),
        vision_aspect_ratio=file.vision_aspect_ratio,
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


def _common_settings(file: LlavaFile, source: str, decoder: str, encoders: tuple[str, ...]) -> _CommonSettings:
    """Reads the settings that the LLaVA families have in common.

    Args:
        file: the top level of the file.
        source: path of the file, for error messages.
        decoder: default `model_type` of the decoder.
        encoders: supported encoders, by `model_type`; the first is the default.
    """
    kinds = (decoder, *(name for name in DECODERS if name != decoder))
    kind = kind_of(file.text_config, kinds, source, "text_config")
    vision = read_vision_config(file.vision_config, source, encoders)
    return {
        "vision": vision,
        "text": read_text_config(file.text_config, source, DECODERS[kind], tied=file.tie_word_embeddings),
        "image_token_id": _image_token(file, source),
        "vision_feature_layers": _hidden_states(file, source, vision.num_layers),
        "drop_first": file.vision_feature_select_strategy == "default",
        "projector_activation": file.projector_hidden_act,
        "projector_bias": file.multimodal_projector_bias,
    }


def _image_token(file: LlavaFile, source: str) -> int:
    """The id of the image token, which both keys name."""
    index, other = file.image_token_index, file.image_token_id
    if other is not None and other != index and "image_token_index" in file.model_fields_set:
        raise refusal(source, "image_token_id", other, f"image_token_index = {index} expected, as it means the same")
    return index if other is None else other


def _hidden_states(file: LlavaFile, source: str, layers: int) -> tuple[int, ...]:
    """The indices of the hidden states in use, counted from the embeddings, which are 0."""
    value = file.vision_feature_layer
    asked = [value] if isinstance(value, int) else value
    states = tuple(state if state >= 0 else layers + 1 + state for state in asked)
    if not all(0 <= state <= layers for state in states):
        expected = f"one or more of the hidden states {-layers - 1} to {layers} are expected"
        raise refusal(source, "vision_feature_layer", value, expected)
    if max(states) == 0:
        expected = "the embeddings alone leave no encoder layer to adapt; this version needs a later hidden state"
        raise refusal(source, "vision_feature_layer", value, expected)
    return states
