"""Checkpoint tables: our parameter paths with their hub keys, shapes and transforms.

Initial shapes, loading, shardings, and export of adapters and checkpoints derive from them. This module defines the
types; the tables of a family are in its folder.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar, cast

import numpy as np

from mars_jax.models.configs import ModelConfig, TextConfig

Transform = Literal["copy", "transpose", "patches", "squeeze"]
HostArray = np.ndarray

EMBEDDING_PATH = "llm/embed_tokens/embedding"
HEAD_PATH = "llm/lm_head/kernel"

# Covariant, so that the table of a family's configuration is also a table of `ModelConfig`. Its functions only receive
# configurations of the same family, which the types cannot express.
ConfigT_co = TypeVar("ConfigT_co", bound=ModelConfig, covariant=True)


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a table: a parameter of a family.

    Attributes:
        path: our path, "/"-joined; layers are stacked on a leading axis if `key` has a `{layer}`.
        key: hub key, with `{layer}` if there is one tensor per layer.
        shape: names of the dimensions (see `CheckpointTable.dimensions`) of our array, without the axis of layers.
        transform: maps the stored tensor to our array. `copy`: unchanged. `transpose`: a torch Linear, [out, in] to
            [in, out]. `patches`: a torch convolution whose stride is its kernel, [D, 3, (t,) p, p] to [3 (t) p p, D].
            `squeeze`: leading dimensions of one are dropped; `shape` names them.
    """

    path: str
    key: str
    shape: tuple[str, ...]
    transform: Transform = "copy"


@dataclass(frozen=True, slots=True)
class ModuleKeys:
    """Names of a module's linears in adapters.

    Attributes:
        prefix: prefix of their hub keys, with `{layer}` if there are layers.
        expression: the same as a regular expression that matches the paths of every transformers version, up to the
            number of the layer.
        pattern_key: key in PEFT's `rank_pattern` and `alpha_pattern`, a regular expression that PEFT matches up to the
            end of a path.
    """

    prefix: str
    expression: str
    pattern_key: str


Substitutions = tuple[tuple[re.Pattern[str], str], ...]


@dataclass(frozen=True, slots=True)
class CheckpointTable(Generic[ConfigT_co]):
    """Checkpoint format of a family, or of its models with one kind of encoder.

    Attributes:
        auto_class: model class in transformers.
        rows: every parameter that such a model can have.
        dimensions: returns the sizes that rows name.
        absent: returns the paths of rows that a model lacks.
        stored_patches: returns the stored shape of a patch embedding's kernel, without the leading D.
        to_hub: substitutions from keys of every published layout to hub keys.
        to_memory: substitutions from hub keys to parameter names in transformers 4.52 and later: the adapter layout.
        unused: returns whether a checkpoint may hold a hub key that the model never reads.
        head_key: hub key of the head, also if it is tied.
        modules: module -> names of its linears in adapters.
        layouts: prefixes of keys, for error messages.
        extra_tensors: hub key -> names of its dimensions, and its value, for tensors that transformers creates but
            never reads.
        vllm: what vLLM can serve: adapters (those of vision and projector need a switch), only merged checkpoints, or
            nothing.
        aliases: end of a linear's hub key -> its name in the newest transformers, if different.
        loading: notes on specific transformers versions, for the model card.
    """

    auto_class: str
    rows: tuple[Row, ...]
    dimensions: Callable[[ConfigT_co], dict[str, int]]
    absent: Callable[[ConfigT_co], set[str]]
    stored_patches: Callable[[ConfigT_co], tuple[int, ...]]
    to_hub: Substitutions
    to_memory: Substitutions
    unused: Callable[[str, ConfigT_co], bool]
    head_key: str
    modules: Mapping[str, ModuleKeys]
    layouts: str
    extra_tensors: Mapping[str, tuple[tuple[str, ...], float]]
    vllm: Literal["adapters", "merged", "nothing"]
    aliases: Mapping[str, str] = field(default_factory=dict)
    loading: str = ""

    @property
    def linears(self) -> dict[str, Row]:
        """The linears that can be adapted, by path: every Linear of the layers and the projector."""
        return {
            row.path.removesuffix("/kernel"): row
            for row in self.rows
            if row.transform == "transpose" and ("{layer}" in row.key or row.path.startswith("projector/"))
        }

    def hub_key(self, key: str) -> str:
        """The hub key of a key in any layout."""
        return _substituted(key, self.to_hub)

    def memory_key(self, key: str) -> str:
        """The name of a hub key in the adapter layout."""
        return _substituted(key, self.to_memory)

    def parameters(self, config: ModelConfig) -> "tuple[Parameter, ...]":
        """Every parameter of one model of the family, with its shape and hub keys."""
        family_config = cast("ConfigT_co", config)
        sizes, absent = self.dimensions(family_config), self.absent(family_config)
        layers = {"vision": config.num_vision_layers_used, "llm": config.text.num_layers}
        resolved = []
        for row in self.rows:
            if row.path in absent:
                continue
            named = tuple(sizes[name] for name in row.shape)
            shape = tuple(size for name, size in zip(row.shape, named, strict=True) if name != "one")
            stored = {
                "copy": shape,
                "squeeze": named,
                "transpose": shape[::-1],
                "patches": (shape[-1], *self.stored_patches(family_config)),
            }[row.transform]
            stacked = "{layer}" in row.key
            count = layers[row.path.split("/")[0]] if stacked else 1
            keys = tuple(row.key.format(layer=layer) for layer in range(count))
            full = (count, *shape) if stacked else shape
            resolved.append(Parameter(row.path, keys, stacked, full, stored, row.transform))
        return tuple(resolved)


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of one model: a row with its sizes.

    Attributes:
        path: our path.
        keys: hub keys, one per layer in order; a single one if layers are not stacked.
        stacked: whether our array has a leading axis of layers.
        shape: shape of our array, with the axis of layers.
        stored_shape: shape of each stored tensor.
        transform: see `Row`.
    """

    path: str
    keys: tuple[str, ...]
    stacked: bool
    shape: tuple[int, ...]
    stored_shape: tuple[int, ...]
    transform: Transform


def linear(path: str, key: str, d_in: str, d_out: str, bias: bool = True) -> tuple[Row, ...]:
    """The rows of a torch Linear."""
    kernel = Row(f"{path}/kernel", f"{key}.weight", (d_in, d_out), "transpose")
    return (kernel, Row(f"{path}/bias", f"{key}.bias", (d_out,))) if bias else (kernel,)


def decoder_rows(prefix: str, head_key: str) -> tuple[Row, ...]:
    """The rows of a Llama or Qwen2 decoder whose hub keys start with `prefix`; see `absent_from_decoder`."""
    layer, attention = f"{prefix}.layers.{{layer}}", f"{prefix}.layers.{{layer}}.self_attn"
    return (
        Row(EMBEDDING_PATH, f"{prefix}.embed_tokens.weight", ("vocabulary", "text")),
        Row("llm/layers/input_layernorm/scale", f"{layer}.input_layernorm.weight", ("text",)),
        Row("llm/layers/post_attention_layernorm/scale", f"{layer}.post_attention_layernorm.weight", ("text",)),
        *linear("llm/layers/self_attn/q_proj", f"{attention}.q_proj", "text", "query"),
        *linear("llm/layers/self_attn/k_proj", f"{attention}.k_proj", "text", "key_value"),
        *linear("llm/layers/self_attn/v_proj", f"{attention}.v_proj", "text", "key_value"),
        *linear("llm/layers/self_attn/o_proj", f"{attention}.o_proj", "query", "text", bias=False),
        *linear("llm/layers/mlp/gate_proj", f"{layer}.mlp.gate_proj", "text", "text_ffn", bias=False),
        *linear("llm/layers/mlp/up_proj", f"{layer}.mlp.up_proj", "text", "text_ffn", bias=False),
        *linear("llm/layers/mlp/down_proj", f"{layer}.mlp.down_proj", "text_ffn", "text", bias=False),
        Row("llm/norm/scale", f"{prefix}.norm.weight", ("text",)),
        *linear("llm/lm_head", head_key.removesuffix(".weight"), "text", "vocabulary", bias=False),
    )


def decoder_dimensions(text: TextConfig) -> dict[str, int]:
    """The sizes that `decoder_rows` names."""
    return {
        "text": text.hidden_size,
        "text_ffn": text.intermediate_size,
        "query": text.num_heads * text.head_dim,
        "key_value": text.num_kv_heads * text.head_dim,
        "vocabulary": text.vocab_size,
    }


def absent_from_decoder(text: TextConfig) -> set[str]:
    """The paths of `decoder_rows` that a decoder lacks."""
    biases = set() if text.attention_bias else {f"llm/layers/self_attn/{name}_proj/bias" for name in "qkv"}
    return biases | ({HEAD_PATH} if text.tie_word_embeddings else set())


def _substituted(key: str, substitutions: Substitutions) -> str:
    for pattern, replacement in substitutions:
        key = pattern.sub(replacement, key)
    return key


def from_stored(tensor: HostArray, transform: Transform) -> HostArray:
    """Maps a stored tensor to our array; a view if possible."""
    to_ours: dict[Transform, Callable[[HostArray], HostArray]] = {
        "copy": lambda x: x,
        "transpose": lambda x: x.T,
        "patches": lambda x: x.reshape(x.shape[0], -1).T,
        "squeeze": lambda x: x.reshape([size for axis, size in enumerate(x.shape) if size > 1 or axis == x.ndim - 1]),
    }
    return to_ours[transform](tensor)


def to_stored(array: HostArray, parameter: Parameter) -> HostArray:
    """Inverse of `from_stored` for one layer; contiguous, because safetensors writes views incorrectly."""
    oriented = array if parameter.transform in ("copy", "squeeze") else array.T
    return np.ascontiguousarray(oriented).reshape(parameter.stored_shape)
