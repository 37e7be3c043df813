"""Architecture configurations as frozen dataclasses, without settings of training or sharding.

Families read them from the `config.json` of a checkpoint. `ModelConfig` and `EncoderConfig` are the common interface of
all families.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol, Self


@dataclass(frozen=True, slots=True)
class VisionConfig:
    """Configuration of a vision transformer over tiles of one size.

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
        """Size of a head."""
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

    @property
    def group(self) -> int:
        """Tokens that the projector merges into one feature row: 1."""
        return 1

    @property
    def gated_mlp(self) -> bool:
        """Whether the MLP has a gate: False, it is two linears in sequence."""
        return False

    @property
    def recomputes_attention(self) -> bool:
        """Whether attention is always recomputed in the backward pass: False."""
        return False

    def sequences(self, layer: int, tiles: int) -> tuple[int, int]:
        """Number and length of attention's sequences: in every layer, each tile is one sequence."""
        return tiles, self.num_positions


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How rotary frequencies are scaled for long contexts: all alike ("linear"), or low ones alone ("llama3").

    With "llama3", frequencies below `low` turns over `original_length` tokens are divided by `factor`, those above
    `high` turns are kept, and those between are interpolated.
    """

    kind: str
    factor: float
    low: float = 1.0
    high: float = 1.0
    original_length: int = 0


@dataclass(frozen=True, slots=True)
class TextConfig:
    """Configuration of a decoder: Llama, or Qwen2 with its biases of queries, keys and values (`attention_bias`).

    `mrope_section` is the number of rotary frequencies of each position axis (time, row, column), as in Qwen2-VL
    (arXiv 2409.12191); None if positions have one axis.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    activation: str = "silu"
    mrope_section: tuple[int, ...] | None = None
    attention_bias: bool = True


class EncoderConfig(Protocol):
    """Configuration of a vision encoder of any family, as planning, prices and sharding read it."""

    @property
    def hidden_size(self) -> int:
        """Width of the encoder."""
        ...

    @property
    def intermediate_size(self) -> int:
        """Width of its MLP."""
        ...

    @property
    def num_layers(self) -> int:
        """Number of layers in a checkpoint."""
        ...

    @property
    def num_heads(self) -> int:
        """Number of attention heads, H."""
        ...

    @property
    def head_dim(self) -> int:
        """Size of a head."""
        ...

    @property
    def num_patches(self) -> int:
        """Patches of one tile."""
        ...

    @property
    def num_positions(self) -> int:
        """Tokens of one tile, P."""
        ...

    @property
    def group(self) -> int:
        """Tokens that the projector merges into one feature row."""
        ...

    @property
    def gated_mlp(self) -> bool:
        """Whether the MLP has a gate, and so two input linears."""
        ...

    @property
    def recomputes_attention(self) -> bool:
        """Whether attention is always recomputed in the backward pass, so that no scores are kept."""
        ...

    def sequences(self, layer: int, tiles: int) -> tuple[int, int]:
        """Number and length of the sequences of a layer's attention, for the N tiles of a sample.

        Args:
            layer: index of the layer, from 0.
            tiles: number of tiles, N.

        Returns:
            The number of sequences, and the tokens of each; together N * P tokens.
        """
        ...


class ModelConfig(Protocol):
    """Configuration of a model of any family."""

    family: ClassVar[str]
    """The family's name in `families.registry.FAMILIES`."""

    @property
    def vision(self) -> EncoderConfig:
        """The vision encoder's configuration."""
        ...

    @property
    def text(self) -> TextConfig:
        """The decoder's configuration."""
        ...

    @property
    def image_token_id(self) -> int:
        """Id of the token that stands for a feature of a picture."""
        ...

    @property
    def around_pictures(self) -> tuple[int, int] | None:
        """Ids of the tokens before and after the image tokens of a picture, where the family has such."""
        ...

    @property
    def num_vision_layers_used(self) -> int:
        """Number of encoder layers whose output reaches the projector."""
        ...

    @property
    def feature_width(self) -> int:
        """Width of the encoder's output: D vision times the number of hidden states in use."""
        ...

    @property
    def trimmed_settings(self) -> Mapping[str, object]:
        """Settings of a `config.json`, by dotted key, that drop encoder layers which never reach the projector."""
        ...

    def with_all_vision_layers(self) -> Self:
        """The same architecture with every encoder layer in use, as checkpoints store it."""
        ...
