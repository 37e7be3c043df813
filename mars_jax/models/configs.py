"""Architecture descriptions as frozen dataclasses: what the Flax modules need, nothing of training or sharding.

`hf_configs` reads them from the `config.json` of a checkpoint.
"""

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, slots=True)
class VisionConfig:
    """A vision transformer over tiles of one size.

    `kind` is its `model_type` in transformers. SigLIP has patches alone; CLIP a class token, a norm before the layers
    and patches without a bias; DINOv2 a class token and a learned scale of every residual branch.
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    image_size: int
    patch_size: int
    kind: str = "siglip_vision_model"
    activation: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6

    @property
    def grid_size(self) -> int:
        """Patches along one side of a tile."""
        return self.image_size // self.patch_size

    @property
    def head_dim(self) -> int:
        """Numbers of a head."""
        return self.hidden_size // self.num_heads

    @property
    def num_patches(self) -> int:
        """Patches of one tile."""
        return self.grid_size**2

    @property
    def class_token(self) -> bool:
        """Whether a learned token comes before the patches."""
        return self.kind != "siglip_vision_model"

    @property
    def num_positions(self) -> int:
        """Tokens of one tile, P: patches, and the class token where there is one."""
        return self.num_patches + self.class_token


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
class TextConfig:
    """A decoder of the Llama kind: Qwen2, whose queries, keys and values have biases, or Llama, where nothing has.

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
    attention_bias: bool = True


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


ModelConfig = LlavaConfig | Qwen25VlConfig
