"""Configuration of Qwen2.5-VL."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

from mars_jax.errors import ConfigError
from mars_jax.models.configs import TextConfig
from mars_jax.models.families.hf_json import (
    TEXT_KEYS,
    Json,
    Part,
    read_image_token,
    read_parts,
    read_text_config,
    require,
)


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
    """Qwen2.5-VL (arXiv 2502.13923): its window-attention encoder, a patch merger, and a Qwen2 decoder with M-RoPE."""

    family: ClassVar[str] = "qwen2_5_vl"

    vision: QwenVisionConfig
    text: TextConfig
    image_token_id: int

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


_VISION_KEYS = (
    "hidden_size",
    "intermediate_size",
    "depth",
    "num_heads",
    "patch_size",
    "out_hidden_size",
    "fullatt_block_indexes",
)
# In older files both parts have the family's name as `model_type`.
_TEXT_DEFAULTS: Json = {"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e6}
_VISION_DEFAULTS: Json = {
    "depth": 32,
    "hidden_size": 3584,
    "intermediate_size": 3420,
    "num_heads": 16,
    "patch_size": 14,
    "out_hidden_size": 3584,
    "fullatt_block_indexes": [7, 15, 23, 31],
}
_DECODERS = ("qwen2_5_vl_text", "qwen2_5_vl")
_TEXT = Part(_DECODERS[0], TEXT_KEYS, dict.fromkeys(_DECODERS, _TEXT_DEFAULTS))
_VISION = Part("qwen2_5_vl", _VISION_KEYS, dict.fromkeys(("qwen2_5_vl", "qwen2_5_vl_vision"), _VISION_DEFAULTS))


def read_qwen2_5_vl(config: Json, source: str) -> Qwen25VlConfig:
    """Reads `config.json`: decoder settings are at the top level on the hub, in `text_config` from transformers 5."""
    if not isinstance(config.get("text_config"), Mapping):
        config = {**config, "text_config": {key: value for key, value in config.items() if key != "vision_config"}}
    text, vision = read_parts(config, source, _TEXT, _VISION)
    tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
    decoder = read_text_config(text, source, tied=bool(tied), kinds=_DECODERS, mrope=True)
    merge, patch = vision.get("spatial_merge_size", 2), vision["patch_size"]
    window = vision.get("window_size", 112)
    require(source, "vision_config.out_hidden_size", vision["out_hidden_size"], (decoder.hidden_size,))
    channels = vision.get("in_channels", vision.get("in_chans", 3))
    require(source, "vision_config.in_channels", channels, (3,))
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
        image_token_id=read_image_token(config, source, 151655),
    )
