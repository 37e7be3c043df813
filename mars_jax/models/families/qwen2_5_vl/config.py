"""Configuration of Qwen2.5-VL."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field

from mars_jax.models.configs import TextConfig
from mars_jax.models.families.hf_json import (
    Activation,
    Epsilon,
    Heads,
    Json,
    Layers,
    RotarySettings,
    Side,
    TextSettings,
    TokenId,
    Width,
    kind_of,
    read_rope,
    read_text_config,
    require,
    require_multiple,
)
from mars_jax.runtime.json_object import Settings, checked, refusal


@dataclass(frozen=True, slots=True)
class QwenVisionConfig:
    """Configuration of the vision encoder, which cuts pictures of any size into windows; a tile is a window."""

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
    rope_theta: float = 10_000.0

    @property
    def window_groups(self) -> int:
        """Groups of `merge_size` x `merge_size` patches, each one image token, along one side of a window."""
        return self.window_size // self.merge_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """Patches of one window, P."""
        return (self.window_groups * self.merge_size) ** 2

    @property
    def num_positions(self) -> int:
        """Tokens of one window: its patches, as there is no class token."""
        return self.num_patches

    @property
    def head_dim(self) -> int:
        """Size of a head."""
        return self.hidden_size // self.num_heads

    @property
    def patch_values(self) -> int:
        """Values of one patch: channels x frames x rows x columns of pixels."""
        return 3 * self.temporal_patch_size * self.patch_size**2

    @property
    def group(self) -> int:
        """Patches that the projector merges into one feature row."""
        return self.merge_size**2

    @property
    def gated_mlp(self) -> bool:
        """Whether the MLP has a gate: True."""
        return True

    @property
    def recomputes_attention(self) -> bool:
        """True; otherwise layers would keep the scores of both kinds of attention: see `model.SelfAttention`."""
        return True

    def sequences(self, layer: int, tiles: int) -> tuple[int, int]:
        """One sequence of all windows in layers with full attention, one per window in the others."""
        whole = layer in self.full_attention_layers
        return (1, tiles * self.num_positions) if whole else (tiles, self.num_positions)


@dataclass(frozen=True, slots=True)
class Qwen25VlConfig:
    """Qwen2.5-VL (arXiv 2502.13923): its window-attention encoder, a patch merger, and a Qwen2 decoder with M-RoPE.

    Attributes:
        around_pictures: ids of the tokens before and after the image tokens of a picture.
    """

    family: ClassVar[str] = "qwen2_5_vl"

    vision: QwenVisionConfig
    text: TextConfig
    image_token_id: int
    around_pictures: tuple[int, int] = (151652, 151653)

    @property
    def num_vision_layers_used(self) -> int:
        """Number of encoder layers, which are all in use."""
        return self.vision.num_layers

    @property
    def feature_width(self) -> int:
        """Width of the last hidden state."""
        return self.vision.hidden_size

    @property
    def trimmed_settings(self) -> Mapping[str, object]:
        """Empty, because all layers are in use."""
        return {}

    def with_all_vision_layers(self) -> Self:
        """The same configuration, because all layers are in use."""
        return self


# The most groups of patches along a side of a window.
_MAX_GROUPS = 64

_LayerNumbers = Annotated[list[Annotated[int, Field(ge=-1024, le=1024)]], Field(max_length=1024)]


class QwenTextSettings(TextSettings):
    """The decoder's settings; transformers' defaults of the sizes are those of the 72B, so files must have them."""

    default_theta: ClassVar[float] = 1e6
    rope_types: ClassVar[tuple[str, ...]] = ("default", "mrope", "linear", "llama3")
    axes: ClassVar[int] = 3

    hidden_size: Width
    num_hidden_layers: Layers
    num_attention_heads: Heads
    num_key_value_heads: Heads | None = 8
    rms_norm_eps: Epsilon = 1e-5


class QwenVisionSettings(RotarySettings):
    """The encoder's settings."""

    rope_types: ClassVar[tuple[str, ...]] = ("default", "axial")

    depth: Layers = 32
    hidden_size: Width = 3584
    intermediate_size: Width = 3420
    num_heads: Heads = 16
    in_channels: Literal[3] = 3
    in_chans: Literal[3] = 3
    patch_size: Side = 14
    spatial_merge_size: Annotated[int, Field(ge=1, le=64)] = 2
    temporal_patch_size: Annotated[int, Field(ge=1, le=64)] = 2
    window_size: Annotated[int, Field(ge=1, le=2**14)] = 112
    out_hidden_size: Width = 3584
    fullatt_block_indexes: _LayerNumbers = Field(default_factory=lambda: [7, 15, 23, 31])
    hidden_act: Activation = "silu"
    head_dim: Heads | None = None
    # transformers also reads these names of `depth` and `num_heads`.
    num_hidden_layers: Layers | None = None
    num_attention_heads: Heads | None = None


class QwenFile(Settings):
    """The top level of the file."""

    text_config: dict[str, Any] | None = None
    vision_config: dict[str, Any]
    image_token_id: TokenId = 151655
    vision_start_token_id: TokenId = 151652
    vision_end_token_id: TokenId = 151653
    tie_word_embeddings: bool | None = None


# In older files both parts have the family's name as `model_type`.
_TEXT_KINDS = ("qwen2_5_vl_text", "qwen2_5_vl")
_VISION_KINDS = ("qwen2_5_vl", "qwen2_5_vl_vision")


def read_qwen2_5_vl(config: Json, source: str) -> Qwen25VlConfig:
    """Reads `config.json`: decoder settings are at the top level on the hub, in `text_config` from transformers 5."""
    file = checked(QwenFile, config, source)
    text, section = (config, "") if file.text_config is None else (file.text_config, "text_config")
    if section:
        kind_of(text, _TEXT_KINDS, source, section)
    decoder = read_text_config(text, source, QwenTextSettings, section, tied=file.tie_word_embeddings)
    return Qwen25VlConfig(
        vision=_read_vision(file.vision_config, source, decoder.hidden_size),
        text=decoder,
        image_token_id=file.image_token_id,
        around_pictures=(file.vision_start_token_id, file.vision_end_token_id),
    )


def _read_vision(vision: Json, source: str, width: int) -> QwenVisionConfig:
    """Reads the encoder's part.

    Args:
        vision: the part.
        source: path of the file, for error messages.
        width: the decoder's width.
    """
    kind_of(vision, _VISION_KINDS, source, "vision_config")
    settings = checked(QwenVisionSettings, vision, source, "vision_config")
    require(source, "vision_config.out_hidden_size", settings.out_hidden_size, (width,))
    require(source, "vision_config.num_hidden_layers", settings.num_hidden_layers, (None, settings.depth))
    require(source, "vision_config.num_attention_heads", settings.num_attention_heads, (None, settings.num_heads))
    require_multiple(source, "vision_config.hidden_size", settings.hidden_size, "num_heads", settings.num_heads)
    head_dim = settings.hidden_size // settings.num_heads
    require(source, "vision_config.head_dim", settings.head_dim, (None, head_dim))
    if head_dim % 4:
        raise refusal(
            source, "vision_config.hidden_size", settings.hidden_size, "heads of a multiple of 4 numbers expected"
        )
    group = settings.patch_size * settings.spatial_merge_size
    if settings.window_size % group or settings.window_size > _MAX_GROUPS * group:
        expected = f"it must be a multiple of patch_size x spatial_merge_size = {group}, at most {_MAX_GROUPS} times it"
        raise refusal(source, "vision_config.window_size", settings.window_size, expected)
    theta, _ = read_rope(settings, source, "vision_config")
    return QwenVisionConfig(
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_layers=settings.depth,
        num_heads=settings.num_heads,
        patch_size=settings.patch_size,
        temporal_patch_size=settings.temporal_patch_size,
        merge_size=settings.spatial_merge_size,
        window_size=settings.window_size,
        full_attention_layers=tuple(settings.fullatt_block_indexes),
        activation=settings.hidden_act,
        rope_theta=theta,
    )
