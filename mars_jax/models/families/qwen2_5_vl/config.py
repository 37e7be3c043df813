"""Configuration of Qwen2.5-VL."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from mars_jax.errors import ConfigError
from mars_jax.models.configs import TextConfig
from mars_jax.models.families.hf_json import TEXT_KEYS, Json, read_image_token, read_parts, read_text_config, require


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
        """The same: there is no class token."""
        return self.num_patches

    @property
    def head_dim(self) -> int:
        """Numbers of a head."""
        return self.hidden_size // self.num_heads

    @property
    def patch_values(self) -> int:
        """Numbers of one patch: channels, moments, rows and columns of pixels."""
        return 3 * self.temporal_patch_size * self.patch_size**2


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


_QWEN_VISION_KEYS = (
    "hidden_size",
    "intermediate_size",
    "depth",
    "num_heads",
    "patch_size",
    "out_hidden_size",
    "fullatt_block_indexes",
)


def read_qwen2_5_vl(config: Json, source: str) -> Qwen25VlConfig:
    """Hub files hold the decoder's settings at the top, those that transformers 5 writes in `text_config`."""
    if not isinstance(config.get("text_config"), Mapping):
        config = {**config, "text_config": {key: value for key, value in config.items() if key != "vision_config"}}
    text, vision = read_parts(config, source, ("qwen2_5_vl_text", "qwen2_5_vl"), TEXT_KEYS, _QWEN_VISION_KEYS)
    tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
    decoder = read_text_config(text, source, tied=bool(tied), mrope=True)
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
