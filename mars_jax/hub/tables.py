"""One table per family: our parameter paths, the hub keys they are stored under, shapes, and the transform between.

Initial shapes, loading, export of adapters and of whole checkpoints all derive from it. It reads and writes nothing.

Three key layouts are in circulation, of which `hub_key` makes one (the hub's own):

    hub files, transformers 4    language_model.model.layers.0...        vision_tower.vision_model.encoder...
    in memory, transformers 5    model.language_model.layers.0...        model.vision_tower.encoder...
    saved by transformers 5      language_model.model.layers.0...        vision_tower.encoder...

>>> hub_key("model.vision_tower.encoder.layers.0.mlp.fc1.weight")
'vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight'
>>> hub_key("lm_head.weight")
'language_model.lm_head.weight'
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from mars_jax.models.configs import LlavaOnevisionConfig

Transform = Literal["copy", "transpose", "patches"]
HostArray = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a table.

    Attributes:
        path: our path, "/"-joined; layers are stacked on a leading axis where `key` has a `{layer}`.
        key: hub key, with `{layer}` where there is one tensor a layer.
        shape: names of the dimensions (see `dimensions`) of our array, without the axis of layers.
        transform: how the stored tensor becomes ours. `copy`: as it is. `transpose`: a torch Linear, [out, in] to
            [in, out]. `patches`: a torch Conv2d whose stride is its kernel, [D, 3, p, p] to [3 p p, D].
    """

    path: str
    key: str
    shape: tuple[str, ...]
    transform: Transform = "copy"


def _linear(path: str, key: str, d_in: str, d_out: str, bias: bool = True) -> tuple[Row, ...]:
    kernel = Row(f"{path}/kernel", f"{key}.weight", (d_in, d_out), "transpose")
    return (kernel, Row(f"{path}/bias", f"{key}.bias", (d_out,))) if bias else (kernel,)


def _layer_norm(path: str, key: str) -> tuple[Row, ...]:
    return Row(f"{path}/scale", f"{key}.weight", ("vision",)), Row(f"{path}/bias", f"{key}.bias", ("vision",))


_VISION = "vision_tower.vision_model"
_VISION_LAYER = f"{_VISION}.encoder.layers.{{layer}}"
_PROJECTOR = "multi_modal_projector"
_LLM = "language_model.model"
_LLM_LAYER = f"{_LLM}.layers.{{layer}}"

LLAVA_ONEVISION: tuple[Row, ...] = (
    Row("vision/patch_embed/kernel", f"{_VISION}.embeddings.patch_embedding.weight", ("pixels", "vision"), "patches"),
    Row("vision/patch_embed/bias", f"{_VISION}.embeddings.patch_embedding.bias", ("vision",)),
    Row("vision/position_embed", f"{_VISION}.embeddings.position_embedding.weight", ("positions", "vision")),
    *_layer_norm("vision/layers/layer_norm1", f"{_VISION_LAYER}.layer_norm1"),
    *_layer_norm("vision/layers/layer_norm2", f"{_VISION_LAYER}.layer_norm2"),
    *_linear("vision/layers/self_attn/q_proj", f"{_VISION_LAYER}.self_attn.q_proj", "vision", "vision"),
    *_linear("vision/layers/self_attn/k_proj", f"{_VISION_LAYER}.self_attn.k_proj", "vision", "vision"),
    *_linear("vision/layers/self_attn/v_proj", f"{_VISION_LAYER}.self_attn.v_proj", "vision", "vision"),
    *_linear("vision/layers/self_attn/out_proj", f"{_VISION_LAYER}.self_attn.out_proj", "vision", "vision"),
    *_linear("vision/layers/mlp/fc1", f"{_VISION_LAYER}.mlp.fc1", "vision", "vision_ffn"),
    *_linear("vision/layers/mlp/fc2", f"{_VISION_LAYER}.mlp.fc2", "vision_ffn", "vision"),
    *_linear("projector/linear_1", f"{_PROJECTOR}.linear_1", "vision", "text"),
    *_linear("projector/linear_2", f"{_PROJECTOR}.linear_2", "text", "text"),
    Row("image_newline", "image_newline", ("text",)),
    Row("llm/embed_tokens/embedding", f"{_LLM}.embed_tokens.weight", ("vocabulary", "text")),
    Row("llm/layers/input_layernorm/scale", f"{_LLM_LAYER}.input_layernorm.weight", ("text",)),
    Row("llm/layers/post_attention_layernorm/scale", f"{_LLM_LAYER}.post_attention_layernorm.weight", ("text",)),
    *_linear("llm/layers/self_attn/q_proj", f"{_LLM_LAYER}.self_attn.q_proj", "text", "query"),
    *_linear("llm/layers/self_attn/k_proj", f"{_LLM_LAYER}.self_attn.k_proj", "text", "key_value"),
    *_linear("llm/layers/self_attn/v_proj", f"{_LLM_LAYER}.self_attn.v_proj", "text", "key_value"),
    *_linear("llm/layers/self_attn/o_proj", f"{_LLM_LAYER}.self_attn.o_proj", "query", "text", bias=False),
    *_linear("llm/layers/mlp/gate_proj", f"{_LLM_LAYER}.mlp.gate_proj", "text", "text_ffn", bias=False),
    *_linear("llm/layers/mlp/up_proj", f"{_LLM_LAYER}.mlp.up_proj", "text", "text_ffn", bias=False),
    *_linear("llm/layers/mlp/down_proj", f"{_LLM_LAYER}.mlp.down_proj", "text_ffn", "text", bias=False),
    Row("llm/norm/scale", f"{_LLM}.norm.weight", ("text",)),
    *_linear("llm/lm_head", "language_model.lm_head", "text", "vocabulary", bias=False),
)

# The linears that take an adapter, by the path of the linear: every Linear of the layers and of the projector.
LINEARS: dict[str, Row] = {
    row.path.removesuffix("/kernel"): row
    for row in LLAVA_ONEVISION
    if row.transform == "transpose" and ("{layer}" in row.key or row.path.startswith("projector/"))
}

EMBEDDING_PATH = "llm/embed_tokens/embedding"
HEAD_PATH = "llm/lm_head/kernel"
HEAD_KEY = "language_model.lm_head.weight"

# Stored, but never read by the model: the encoder is used up to the state before its last norm.
_UNUSED = re.compile(rf"{re.escape(_VISION)}\.(post_layernorm|head)\..*|.*\.position_ids|.*\.rotary_emb\.inv_freq")
_LAYER_OF_VISION = re.compile(rf"{re.escape(_VISION)}\.encoder\.layers\.(\d+)\..*")

_TO_HUB = (
    (re.compile(r"^model\.language_model\."), "language_model.model."),
    (re.compile(r"^model\.(?=(vision_tower|multi_modal_projector|image_newline)\b)"), ""),
    (re.compile(r"^lm_head\."), "language_model.lm_head."),
    (re.compile(r"^vision_tower\.(?!vision_model\.)"), "vision_tower.vision_model."),
)


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


def dimensions(config: LlavaOnevisionConfig) -> dict[str, int]:
    """The sizes that the table names."""
    vision, text = config.vision, config.text
    return {
        "pixels": 3 * vision.patch_size**2,
        "positions": vision.num_patches,
        "vision": vision.hidden_size,
        "vision_ffn": vision.intermediate_size,
        "text": text.hidden_size,
        "text_ffn": text.intermediate_size,
        "query": text.num_heads * text.head_dim,
        "key_value": text.num_kv_heads * text.head_dim,
        "vocabulary": text.vocab_size,
    }


def parameters(config: LlavaOnevisionConfig) -> tuple[Parameter, ...]:
    """The table for one model: every parameter it has, with shapes."""
    sizes = dimensions(config)
    layers = {"vision": config.num_vision_layers_used, "llm": config.text.num_layers}
    resolved = []
    for row in LLAVA_ONEVISION:
        if row.path == HEAD_PATH and config.text.tie_word_embeddings:
            continue
        if re.fullmatch("projector/.*/bias", row.path) and not config.projector_bias:
            continue
        shape = tuple(sizes[name] for name in row.shape)
        patch = config.vision.patch_size
        stored = {
            "copy": shape,
            "transpose": shape[::-1],
            "patches": (shape[-1], 3, patch, patch),
        }[row.transform]
        stacked = "{layer}" in row.key
        count = layers[row.path.split("/")[0]] if stacked else 1
        keys = tuple(row.key.format(layer=layer) for layer in range(count))
        full = (count, *shape) if stacked else shape
        resolved.append(Parameter(row.path, keys, stacked, full, stored, row.transform))
    return tuple(resolved)


def hub_key(key: str) -> str:
    """The hub's name of a key of any of the three layouts."""
    for pattern, replacement in _TO_HUB:
        key = pattern.sub(replacement, key)
    return key


def memory_key(key: str) -> str:
    """The name that transformers 4.52 and later give a hub key in memory, keeping `vision_model.`: the adapter layout.

    >>> memory_key("language_model.model.layers.0.mlp.up_proj")
    'model.language_model.layers.0.mlp.up_proj'
    """
    if key.startswith("language_model.lm_head"):
        return key.removeprefix("language_model.")
    return "model." + re.sub(r"^language_model\.model\.", "language_model.", key)


def is_unused(key: str, config: LlavaOnevisionConfig) -> bool:
    """Whether a hub key may be left over: norms and heads past the hidden state that the model reads, and buffers."""
    layer = _LAYER_OF_VISION.fullmatch(key)
    if layer:
        return config.num_vision_layers_used <= int(layer[1]) < config.vision.num_layers
    return bool(_UNUSED.fullmatch(key))


def from_stored(tensor: HostArray, transform: Transform) -> HostArray:
    """A stored tensor in our orientation; a view where possible."""
    to_ours: dict[Transform, Callable[[HostArray], HostArray]] = {
        "copy": lambda x: x,
        "transpose": lambda x: x.T,
        "patches": lambda x: x.reshape(x.shape[0], -1).T,
    }
    return to_ours[transform](tensor)


def to_stored(array: HostArray, parameter: Parameter) -> HostArray:
    """Inverse of `from_stored` for one layer; contiguous, because safetensors writes garbage for views."""
    oriented = array if parameter.transform == "copy" else array.T
    return np.ascontiguousarray(oriented).reshape(parameter.stored_shape)
