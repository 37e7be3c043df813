"""Architecture descriptions as frozen dataclasses: what the Flax modules need, nothing of training or sharding.

`hf_json` reads them from the `config.json` of a checkpoint.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol


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


class EncoderConfig(Protocol):
    """What planning and layout need of a vision encoder's configuration, whatever its family."""

    @property
    def hidden_size(self) -> int:
        """Width of the encoder."""
        ...

    @property
    def intermediate_size(self) -> int:
        """Width of its MLP."""
        ...

    @property
    def num_heads(self) -> int:
        """Attention heads."""
        ...

    @property
    def head_dim(self) -> int:
        """Numbers of a head."""
        ...

    @property
    def num_patches(self) -> int:
        """Patches of one tile."""
        ...

    @property
    def num_positions(self) -> int:
        """Tokens of one tile, P."""
        ...


class ModelConfig(Protocol):
    """Configuration of a model of any family."""

    family: ClassVar[str]

    @property
    def vision(self) -> Any:
        """The vision encoder's configuration, an `EncoderConfig`."""
        ...

    @property
    def text(self) -> TextConfig:
        """The decoder's configuration."""
        ...

    @property
    def image_token_id(self) -> int:
        """The token that stands for a feature of a picture."""
        ...

    @property
    def num_vision_layers_used(self) -> int:
        """Encoder layers that reach the projector."""
        ...
