"""Reads architectures from Hugging Face `config.json` dictionaries written by transformers 4 or 5.

A schema per `model_type` declares every key that changes what transformers computes, with its type, range and default.
Keys that it does not name change nothing there.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field

from mars_jax.models.configs import RopeScaling, TextConfig, VisionConfig
from mars_jax.models.layers import ACTIVATIONS
from mars_jax.runtime.json_object import Settings, checked, key_in, refusal, shown

Json = Mapping[str, Any]
"""A parsed JSON object, read only."""

_SUPPORTED = "this version supports {}"


def _known_activation(name: str) -> str:
    if name not in ACTIVATIONS:
        raise ValueError(_SUPPORTED.format(", ".join(map(repr, ACTIVATIONS))))
    return name


def _side(value: object) -> object:
    """The side of a square, which may be given as height and width."""
    if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
        return value[0]
    return value


Width = Annotated[int, Field(ge=1, le=2**18)]
Layers = Annotated[int, Field(ge=1, le=1024)]
Heads = Annotated[int, Field(ge=1, le=4096)]
HeadSize = Annotated[int, Field(ge=1, le=2**14)]
VocabSize = Annotated[int, Field(ge=1, le=2**24)]
Length = Annotated[int, Field(ge=1, le=2**40)]
TokenId = Annotated[int, Field(ge=0, lt=2**24)]
Side = Annotated[int, Field(ge=1, le=4096), BeforeValidator(_side)]
Epsilon = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0, le=1e15)]
Activation = Annotated[str, AfterValidator(_known_activation)]
One = Annotated[float, Field(ge=1, le=1)]


class Rope(Settings):
    """`rope_parameters` of transformers 5, and `rope_scaling` of transformers 4."""

    model_config = ConfigDict(extra="allow")

    rope_type: str | None = None
    type: str | None = None
    rope_theta: Positive | None = None
    factor: Positive | None = None
    low_freq_factor: Positive | None = None
    high_freq_factor: Positive | None = None
    original_max_position_embeddings: Length | None = None
    mrope_section: Annotated[list[Annotated[int, Field(ge=0, le=4096)]], Field(max_length=8)] | None = None
    partial_rotary_factor: One | None = None
    # Parameters for each kind of layer.
    full_attention: None = None
    sliding_attention: None = None


class RotarySettings(Settings):
    """The settings of rotary positions, in the text or the vision part."""

    default_theta: ClassVar[float] = 10_000.0
    rope_types: ClassVar[tuple[str, ...]] = ("default", "linear", "llama3")

    rope_parameters: Rope | None = None
    rope_scaling: Rope | None = None
    rope_theta: Positive | None = None
    partial_rotary_factor: One | None = None
    max_position_embeddings: Length | None = None


class TextSettings(RotarySettings):
    """A decoder's settings, with the defaults of Llama and Qwen2."""

    has_biases: ClassVar[bool] = True
    axes: ClassVar[int] = 1

    vocab_size: VocabSize
    hidden_size: Width = 4096
    intermediate_size: Width
    num_hidden_layers: Layers = 32
    num_attention_heads: Heads = 32
    num_key_value_heads: Heads | None = None
    head_dim: HeadSize | None = None
    hidden_act: Activation = "silu"
    rms_norm_eps: Epsilon = 1e-6
    tie_word_embeddings: bool | None = None
    use_sliding_window: Literal[False] | None = None
    layer_types: Annotated[list[Literal["full_attention"]], Field(max_length=1024)] | None = None


class LlamaSettings(TextSettings):
    """Settings of `llama`."""

    has_biases: ClassVar[bool] = False

    vocab_size: VocabSize = 32000
    intermediate_size: Width = 11008
    attention_bias: Literal[False] | None = None
    mlp_bias: Literal[False] | None = None


class Qwen2Settings(TextSettings):
    """Settings of `qwen2`."""

    vocab_size: VocabSize = 151936
    intermediate_size: Width = 22016
    num_key_value_heads: Heads | None = 32


class TileEncoderSettings(Settings):
    """Settings of a vision transformer over tiles of one size."""

    hidden_size: Width = 768
    num_hidden_layers: Layers = 12
    num_attention_heads: Heads = 12
    num_channels: Literal[3] = 3
    image_size: Side = 224
    patch_size: Side
    hidden_act: Activation
    layer_norm_eps: Epsilon = 1e-6

    @abstractmethod
    def mlp_width(self) -> int:
        """Width of the MLP."""


class _WithMlpWidth(TileEncoderSettings):
    """Settings that name the width of the MLP."""

    intermediate_size: Width = 3072

    def mlp_width(self) -> int:
        """Width of the MLP."""
        return self.intermediate_size


class ClipSettings(_WithMlpWidth):
    """Settings of `clip_vision_model`."""

    patch_size: Side = 32
    hidden_act: Activation = "quick_gelu"
    layer_norm_eps: Epsilon = 1e-5


class SiglipSettings(_WithMlpWidth):
    """Settings of `siglip_vision_model`."""

    patch_size: Side = 16
    hidden_act: Activation = "gelu_pytorch_tanh"


class Dinov2Settings(TileEncoderSettings):
    """Settings of `dinov2`."""

    patch_size: Side = 14
    mlp_ratio: Annotated[float, Field(gt=0, le=64)] = 4
    hidden_act: Activation = "gelu"
    qkv_bias: Literal[True] = True
    use_swiglu_ffn: Literal[False] = False
    head_dim: HeadSize | None = None

    def mlp_width(self) -> int:
        """Width of the MLP."""
        return int(self.hidden_size * self.mlp_ratio)


DECODERS: dict[str, type[TextSettings]] = {"llama": LlamaSettings, "qwen2": Qwen2Settings}
ENCODERS: dict[str, type[TileEncoderSettings]] = {
    "clip_vision_model": ClipSettings,
    "siglip_vision_model": SiglipSettings,
    "dinov2": Dinov2Settings,
}


def kind_of(settings: Json, kinds: Sequence[str], source: str, section: str) -> str:
    """The `model_type` of a part of a file.

    Args:
        settings: the part.
        kinds: the supported ones; the first is that of a part that names none.
        source: path of the file, for error messages.
        section: key of the part.

    Raises:
        ConfigError: it is not supported.
    """
    kind = settings.get("model_type", kinds[0])
    require(source, key_in(section, "model_type"), kind, tuple(kinds))
    return str(kind)


def read_vision_config(vision: Json, source: str, kinds: tuple[str, ...]) -> VisionConfig:
    """Reads a vision transformer's settings; its `model_type` must be one of `kinds`, and is the first by default."""
    kind = kind_of(vision, kinds, source, "vision_config")
    settings = checked(ENCODERS[kind], vision, source, "vision_config")
    heads, hidden = settings.num_attention_heads, settings.hidden_size
    require_multiple(source, "vision_config.hidden_size", hidden, "num_attention_heads", heads)
    if settings.patch_size > settings.image_size:
        raise refusal(
            source, "vision_config.patch_size", settings.patch_size, f"at most image_size = {settings.image_size}"
        )
    if isinstance(settings, Dinov2Settings):
        require(source, "vision_config.head_dim", settings.head_dim, (None, hidden // heads))
    return VisionConfig(
        hidden_size=hidden,
        intermediate_size=settings.mlp_width(),
        num_layers=settings.num_hidden_layers,
        num_heads=heads,
        image_size=settings.image_size,
        patch_size=settings.patch_size,
        kind=kind,
        activation=settings.hidden_act,
        layer_norm_eps=settings.layer_norm_eps,
    )


def read_text_config(
    text: Json, source: str, kind: type[TextSettings], section: str = "text_config", *, tied: bool | None
) -> TextConfig:
    """Reads a decoder's settings. transformers 5 writes `rope_parameters`, 4 `rope_theta` and `rope_scaling`.

    Args:
        text: the part of the file.
        source: path of the file, for error messages.
        kind: the schema of the part.
        section: key of the part; "" where the decoder's settings are at the top level.
        tied: whether the head is the embedding, as the top level says.

    Raises:
        ConfigError: a setting that is not possible, or that this version does not implement.
    """
    settings = checked(kind, text, source, section)
    heads = settings.num_attention_heads
    kv_heads = settings.num_key_value_heads or heads
    if settings.head_dim is None:
        require_multiple(source, key_in(section, "hidden_size"), settings.hidden_size, "num_attention_heads", heads)
    kv_name = "num_key_value_heads" if "num_key_value_heads" in text else "num_key_value_heads (by default)"
    require_multiple(source, key_in(section, "num_attention_heads"), heads, kv_name, kv_heads)
    head_dim = settings.head_dim or settings.hidden_size // heads
    if head_dim % 2:
        raise refusal(source, key_in(section, "head_dim"), head_dim, "rotary positions need an even number")
    types = settings.layer_types
    if types is not None and len(types) != settings.num_hidden_layers:
        raise refusal(
            source, key_in(section, "layer_types"), types, f"num_hidden_layers = {settings.num_hidden_layers} expected"
        )
    theta, scaling = read_rope(settings, source, section)
    return TextConfig(
        vocab_size=settings.vocab_size,
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_layers=settings.num_hidden_layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rope_theta=theta,
        rope_scaling=scaling,
        rms_norm_eps=settings.rms_norm_eps,
        # transformers ties where either part of the file says so.
        tie_word_embeddings=bool(tied or settings.tie_word_embeddings),
        activation=settings.hidden_act,
        mrope_section=_mrope_section(settings, head_dim, source, section) if settings.axes > 1 else None,
        attention_bias=settings.has_biases,
    )


def read_rope(settings: RotarySettings, source: str, section: str) -> tuple[float, RopeScaling | None]:
    """The base of rotary frequencies and how they are scaled.

    As in transformers 5.24, `rope_scaling` replaces `rope_parameters` where a file has both.

    Args:
        settings: the part of the file.
        source: path of the file, for error messages.
        section: key of the part; "" for the top level.

    Raises:
        ConfigError: a kind of scaling that this version does not implement, or one that lacks a number.
    """
    name, rope = _rope(settings)
    key = key_in(section, name)
    kind = rope.rope_type or rope.type or "default"
    require(source, f"{key}.rope_type", kind, settings.rope_types)
    theta = rope.rope_theta or settings.rope_theta or settings.default_theta
    if kind not in ("linear", "llama3"):
        return theta, None
    limit = rope.original_max_position_embeddings or settings.max_position_embeddings
    needed: dict[str, float | None] = {"factor": rope.factor}
    if kind == "llama3":
        needed |= {
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            "original_max_position_embeddings": limit,
        }
    for needed_key, value in needed.items():
        if value is None:
            raise refusal(source, f"{key}.{needed_key}", None, f"rope_type {kind!r} needs a number")
    low, high = rope.low_freq_factor or 1.0, rope.high_freq_factor or 1.0
    if kind == "llama3" and high <= low:
        raise refusal(source, f"{key}.high_freq_factor", high, f"more than low_freq_factor = {low} expected")
    return theta, RopeScaling(kind, float(rope.factor or 1.0), low, high, int(limit or 0))


def _rope(settings: RotarySettings) -> tuple[str, Rope]:
    """Key and value of the parameters of rotary positions that count."""
    if settings.rope_scaling is not None and settings.rope_scaling.model_fields_set:
        return "rope_scaling", settings.rope_scaling
    return "rope_parameters", settings.rope_parameters or Rope()


def _mrope_section(settings: RotarySettings, head_dim: int, source: str, section: str) -> tuple[int, ...]:
    name, rope = _rope(settings)
    parts = tuple(rope.mrope_section or (16, 24, 24))
    if len(parts) != 3 or 2 * sum(parts) != head_dim:
        expected = f"three numbers that add up to half the head size, {head_dim // 2}, are expected"
        raise refusal(source, key_in(section, name, "mrope_section"), list(parts), expected)
    return parts


def require(source: str, key: str, value: object, allowed: tuple[object, ...]) -> None:
    """Refuses a setting that this version does not implement.

    Raises:
        ConfigError: the value is not in `allowed`.
    """
    if value not in allowed:
        raise refusal(source, key, value, _SUPPORTED.format(", ".join(map(shown, allowed))))


def require_multiple(source: str, key: str, value: int, other: str, divisor: int) -> None:
    """Refuses a number that another one must divide.

    Raises:
        ConfigError: there is a rest.
    """
    if value % divisor:
        raise refusal(source, key, value, f"it must be a multiple of {other} = {divisor}")
