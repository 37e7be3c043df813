"""One table per family: our parameter paths, the hub keys they are stored under, shapes, and the transform between.

Initial shapes, loading, export of adapters and of whole checkpoints all derive from it. Here is what tables are made
of; each is in a file of its own, found through `families`. Nothing is read or written here.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from mars_jax.models.configs import ModelConfig, TextConfig

Transform = Literal["copy", "transpose", "patches", "squeeze"]
HostArray = np.ndarray[Any, Any]

EMBEDDING_PATH = "llm/embed_tokens/embedding"
HEAD_PATH = "llm/lm_head/kernel"


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a table.

    Attributes:
        path: our path, "/"-joined; layers are stacked on a leading axis where `key` has a `{layer}`.
        key: hub key, with `{layer}` where there is one tensor a layer.
        shape: names of the dimensions (see `Family.dimensions`) of our array, without the axis of layers.
        transform: how the stored tensor becomes ours. `copy`: as it is. `transpose`: a torch Linear, [out, in] to
            [in, out]. `patches`: a torch convolution whose stride is its kernel, [D, 3, (t,) p, p] to [3 (t) p p, D].
            `squeeze`: leading dimensions of one left out; `shape` names them.
    """

    path: str
    key: str
    shape: tuple[str, ...]
    transform: Transform = "copy"


@dataclass(frozen=True, slots=True)
class ModuleKeys:
    """How the linears of a module are called in adapters.

    Attributes:
        prefix: the start of their hub keys, with `{layer}` where there are layers.
        expression: the same as a regular expression that fits the paths of every transformers version, up to the
            number of the layer.
        pattern_key: the key under which `rank_pattern` and `alpha_pattern` of PEFT reach them: PEFT matches it up to
            the end of a path.
    """

    prefix: str
    expression: str
    pattern_key: str


Substitutions = tuple[tuple[re.Pattern[str], str], ...]


@dataclass(frozen=True, slots=True)
class Family:
    """How one model family is stored.

    Attributes:
        auto_class: its class in transformers.
        rows: every parameter that a model of the family can have.
        dimensions: the sizes that rows name.
        absent: paths of rows that a model doesn't have.
        stored_patches: shape of a patch embedding's kernel as stored, without the leading D.
        to_hub: makes a key of any layout in circulation one of the hub's.
        to_memory: makes a hub key the name that transformers 4.52 and later give it in memory: the adapter layout.
        unused: whether a hub key may be left over: what the model never reads.
        head_key: hub key of the head, also where it is tied.
        modules: module -> how adapters call its linears.
        layouts: what keys start with, for people.
        extra_tensors: hub key -> names of its dimensions, and its value, of tensors that transformers builds and never
            reads.
        vllm: what vLLM takes of the family: adapters (those of vision and projector behind a switch), only merged
            checkpoints, or nothing.
        aliases: end of a linear's hub key -> its name in the memory of the newest transformers, where that isn't the
            same.
        loading: what to know of single transformers versions, for the model card.
    """

    auto_class: str
    rows: tuple[Row, ...]
    dimensions: Callable[[Any], dict[str, int]]
    absent: Callable[[Any], set[str]]
    stored_patches: Callable[[Any], tuple[int, ...]]
    to_hub: Substitutions
    to_memory: Substitutions
    unused: Callable[[str, Any], bool]
    head_key: str
    modules: Mapping[str, ModuleKeys]
    layouts: str
    extra_tensors: Mapping[str, tuple[tuple[str, ...], float]]
    vllm: Literal["adapters", "merged", "nothing"]
    aliases: Mapping[str, str] = field(default_factory=dict)
    loading: str = ""

    @property
    def linears(self) -> dict[str, Row]:
        """The linears that take an adapter, by the path of the linear: every Linear of the layers and the projector."""
        return {
            row.path.removesuffix("/kernel"): row
            for row in self.rows
            if row.transform == "transpose" and ("{layer}" in row.key or row.path.startswith("projector/"))
        }

    def hub_key(self, key: str) -> str:
        """The hub's name of a key of any layout."""
        return _substituted(key, self.to_hub)

    def memory_key(self, key: str) -> str:
        """The adapter layout's name of a hub key."""
        return _substituted(key, self.to_memory)

    def parameters(self, config: ModelConfig) -> "tuple[Parameter, ...]":
        """The table for one model: every parameter it has, with shapes."""
        sizes, absent = self.dimensions(config), self.absent(config)
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
                "patches": (shape[-1], *self.stored_patches(config)),
            }[row.transform]
            stacked = "{layer}" in row.key
            count = layers[row.path.split("/")[0]] if stacked else 1
            keys = tuple(row.key.format(layer=layer) for layer in range(count))
            full = (count, *shape) if stacked else shape
            resolved.append(Parameter(row.path, keys, stacked, full, stored, row.transform))
        return tuple(resolved)


@dataclass(frozen=True, slots=True)
class Parameter:
    """A row for one model.

    Attributes:
        path: our path.
        keys: hub keys, one a layer in order; a single one where layers are not stacked.
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
    """The rows of a decoder of the Llama kind whose hub keys start with `prefix`; see `absent_from_decoder`."""
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
    """The paths of `decoder_rows` that a decoder doesn't have."""
    biases = set() if text.attention_bias else {f"llm/layers/self_attn/{name}_proj/bias" for name in "qkv"}
    return biases | ({HEAD_PATH} if text.tie_word_embeddings else set())


def _substituted(key: str, substitutions: Substitutions) -> str:
    for pattern, replacement in substitutions:
        key = pattern.sub(replacement, key)
    return key


def from_stored(tensor: HostArray, transform: Transform) -> HostArray:
    """A stored tensor in our orientation; a view where possible."""
    to_ours: dict[Transform, Callable[[HostArray], HostArray]] = {
        "copy": lambda x: x,
        "transpose": lambda x: x.T,
        "patches": lambda x: x.reshape(x.shape[0], -1).T,
        "squeeze": lambda x: x.reshape([size for axis, size in enumerate(x.shape) if size > 1 or axis == x.ndim - 1]),
    }
    return to_ours[transform](tensor)


def to_stored(array: HostArray, parameter: Parameter) -> HostArray:
    """Inverse of `from_stored` for one layer; contiguous, because safetensors writes garbage for views."""
    oriented = array if parameter.transform in ("copy", "squeeze") else array.T
    return np.ascontiguousarray(oriented).reshape(parameter.stored_shape)
