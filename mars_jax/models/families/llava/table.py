"""Checkpoint tables of the LLaVA families. Three key layouts are published, the first of them on the hub:

    hub files, transformers 4    language_model.model.layers.0...        vision_tower.vision_model.encoder...
    in memory, transformers 5    model.language_model.layers.0...        model.vision_tower.encoder...
    saved by transformers 5      language_model.model.layers.0...        vision_tower.encoder...

>>> ONEVISION.hub_key("model.vision_tower.encoder.layers.0.mlp.fc1.weight")
'vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight'
>>> ONEVISION.hub_key("lm_head.weight")
'language_model.lm_head.weight'
>>> ONEVISION.memory_key("language_model.model.layers.0.mlp.up_proj")
'model.language_model.layers.0.mlp.up_proj'
>>> WITH_DINOV2.hub_key("model.vision_tower.encoder.layer.0.attention.q_proj.weight")
'vision_tower.encoder.layer.0.attention.attention.query.weight'
"""

import re
from dataclasses import replace

from mars_jax.models.families.llava.config import LlavaConfig
from mars_jax.models.families.tables import (
    CheckpointTable,
    ModuleKeys,
    Row,
    absent_from_decoder,
    decoder_dimensions,
    decoder_rows,
    linear,
)

_VISION = "vision_tower.vision_model"
_LAYER = f"{_VISION}.encoder.layers.{{layer}}"
_DINO = "vision_tower.encoder.layer.{layer}"
_PROJECTOR = "multi_modal_projector"
_HEAD_KEY = "language_model.lm_head.weight"

# Stored in checkpoints but not used: the encoder ends at a hidden state before its last norm.
_UNUSED = re.compile(
    r"vision_tower\.(vision_model\.(post_layernorm|head)|layernorm)\..*|vision_tower\.embeddings\.mask_token"
    r"|.*\.position_ids|.*\.rotary_emb\.inv_freq"
)
_LAYER_OF_VISION = re.compile(r"vision_tower\.(?:vision_model\.)?encoder\.layers?\.(\d+)\..*")


def _norm(path: str, key: str) -> tuple[Row, ...]:
    return Row(f"{path}/scale", f"{key}.weight", ("vision",)), Row(f"{path}/bias", f"{key}.bias", ("vision",))


_LAYERS = (
    *_norm("vision/layers/layer_norm1", f"{_LAYER}.layer_norm1"),
    *_norm("vision/layers/layer_norm2", f"{_LAYER}.layer_norm2"),
    *linear("vision/layers/self_attn/q_proj", f"{_LAYER}.self_attn.q_proj", "vision", "vision"),
    *linear("vision/layers/self_attn/k_proj", f"{_LAYER}.self_attn.k_proj", "vision", "vision"),
    *linear("vision/layers/self_attn/v_proj", f"{_LAYER}.self_attn.v_proj", "vision", "vision"),
    *linear("vision/layers/self_attn/out_proj", f"{_LAYER}.self_attn.out_proj", "vision", "vision"),
    *linear("vision/layers/mlp/fc1", f"{_LAYER}.mlp.fc1", "vision", "vision_ffn"),
    *linear("vision/layers/mlp/fc2", f"{_LAYER}.mlp.fc2", "vision_ffn", "vision"),
)
_PATCHES = Row(
    "vision/patch_embed/kernel", f"{_VISION}.embeddings.patch_embedding.weight", ("pixels", "vision"), "patches"
)
_POSITIONS = Row("vision/position_embed", f"{_VISION}.embeddings.position_embedding.weight", ("positions", "vision"))

_SIGLIP = (
    _PATCHES,
    Row("vision/patch_embed/bias", f"{_VISION}.embeddings.patch_embedding.bias", ("vision",)),
    _POSITIONS,
    *_LAYERS,
)
_CLIP = (
    _PATCHES,
    Row("vision/class_embed", f"{_VISION}.embeddings.class_embedding", ("vision",)),
    _POSITIONS,
    *_norm("vision/pre_layernorm", f"{_VISION}.pre_layrnorm"),
    *_LAYERS,
)
_DINOV2 = (
    Row(
        "vision/patch_embed/kernel",
        "vision_tower.embeddings.patch_embeddings.projection.weight",
        ("pixels", "vision"),
        "patches",
    ),
    Row("vision/patch_embed/bias", "vision_tower.embeddings.patch_embeddings.projection.bias", ("vision",)),
    Row("vision/class_embed", "vision_tower.embeddings.cls_token", ("one", "one", "vision"), "squeeze"),
    Row(
        "vision/position_embed",
        "vision_tower.embeddings.position_embeddings",
        ("one", "positions", "vision"),
        "squeeze",
    ),
    *_norm("vision/layers/layer_norm1", f"{_DINO}.norm1"),
    *_norm("vision/layers/layer_norm2", f"{_DINO}.norm2"),
    *linear("vision/layers/self_attn/q_proj", f"{_DINO}.attention.attention.query", "vision", "vision"),
    *linear("vision/layers/self_attn/k_proj", f"{_DINO}.attention.attention.key", "vision", "vision"),
    *linear("vision/layers/self_attn/v_proj", f"{_DINO}.attention.attention.value", "vision", "vision"),
    *linear("vision/layers/self_attn/out_proj", f"{_DINO}.attention.output.dense", "vision", "vision"),
    Row("vision/layers/layer_scale1/scale", f"{_DINO}.layer_scale1.lambda1", ("vision",)),
    *linear("vision/layers/mlp/fc1", f"{_DINO}.mlp.fc1", "vision", "vision_ffn"),
    *linear("vision/layers/mlp/fc2", f"{_DINO}.mlp.fc2", "vision_ffn", "vision"),
    Row("vision/layers/layer_scale2/scale", f"{_DINO}.layer_scale2.lambda1", ("vision",)),
)
_JOINED = (
    *linear("projector/linear_1", f"{_PROJECTOR}.linear_1", "features", "text"),
    *linear("projector/linear_2", f"{_PROJECTOR}.linear_2", "text", "text"),
    *decoder_rows("language_model.model", _HEAD_KEY),
)


def _dimensions(config: LlavaConfig) -> dict[str, int]:
    vision = config.vision
    return decoder_dimensions(config.text) | {
        "pixels": 3 * vision.patch_size**2,
        "positions": vision.num_positions,
        "vision": vision.hidden_size,
        "vision_ffn": vision.intermediate_size,
        "features": config.feature_width,
        "one": 1,
    }


def _absent(config: LlavaConfig) -> set[str]:
    biases = set() if config.projector_bias else {f"projector/linear_{number}/bias" for number in (1, 2)}
    return biases | absent_from_decoder(config.text)


def _unused(key: str, config: LlavaConfig) -> bool:
    """Whether a key belongs to layers, norms and heads after the last hidden state in use, or to a buffer."""
    layer = _LAYER_OF_VISION.fullmatch(key)
    if layer:
        return config.num_vision_layers_used <= int(layer[1]) < config.vision.num_layers
    return bool(_UNUSED.fullmatch(key))


ONEVISION: CheckpointTable[LlavaConfig] = CheckpointTable(
    auto_class="LlavaOnevisionForConditionalGeneration",
    rows=(*_SIGLIP, Row("image_newline", "image_newline", ("text",)), *_JOINED),
    dimensions=_dimensions,
    absent=_absent,
    stored_patches=lambda config: (3, config.vision.patch_size, config.vision.patch_size),
    to_hub=(
        (re.compile(r"^model\.language_model\."), "language_model.model."),
        (re.compile(r"^model\.(?=(vision_tower|multi_modal_projector|image_newline)\b)"), ""),
        (re.compile(r"^lm_head\."), "language_model.lm_head."),
        (re.compile(r"^vision_tower\.(?!vision_model\.)"), "vision_tower.vision_model."),
    ),
    # `vision_model.` is kept: transformers 5.6 and later accept the longer name, earlier versions require it.
    to_memory=(
        (re.compile(r"^language_model\.model\."), "model.language_model."),
        (re.compile(r"^language_model\.lm_head"), "lm_head"),
        (re.compile(r"^(?=vision_tower\.|multi_modal_projector\.|image_newline)"), "model."),
    ),
    unused=_unused,
    head_key=_HEAD_KEY,
    modules={
        "vision": ModuleKeys(f"{_LAYER}.", r"vision_tower\.(vision_model\.)?encoder\.layers\.", r".*vision_tower\..*"),
        "projector": ModuleKeys(f"{_PROJECTOR}.", r"multi_modal_projector\.", r".*multi_modal_projector\..*"),
        "llm": ModuleKeys(
            "language_model.model.layers.{layer}.", r"language_model(\.model)?\.layers\.", r".*language_model\..*"
        ),
    },
    layouts="language_model.model., model.language_model., vision_tower. or model.vision_tower.",
    # transformers creates this norm although the model never uses it, and warns if it is missing.
    extra_tensors={
        f"{_VISION}.post_layernorm.weight": (("vision",), 1.0),
        f"{_VISION}.post_layernorm.bias": (("vision",), 0.0),
    },
    vllm="merged",
)
WITH_SIGLIP = replace(
    ONEVISION,
    auto_class="LlavaForConditionalGeneration",
    rows=(*_SIGLIP, *_JOINED),
    vllm="adapters",
)
WITH_CLIP = replace(WITH_SIGLIP, rows=(*_CLIP, *_JOINED))
_QUERIES = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}
WITH_DINOV2 = replace(
    WITH_SIGLIP,
    rows=(*_DINOV2, *_JOINED),
    vllm="nothing",
    to_hub=(
        *ONEVISION.to_hub[:-1],
        *(
            (re.compile(rf"\.attention\.{short}(?=\.|$)"), f".attention.attention.{name}")
            for name, short in _QUERIES.items()
        ),
        (re.compile(r"^(vision_tower\..*)\.attention\.o_proj(?=\.|$)"), r"\1.attention.output.dense"),
    ),
    modules={
        **WITH_SIGLIP.modules,
        "vision": ModuleKeys(f"{_DINO}.", r"vision_tower\.encoder\.layer\.", r".*vision_tower\..*"),
    },
    # transformers 5.23 renames these in memory, and still reads adapters with the older names.
    aliases={
        **{f"attention.attention.{name}": f"attention.{short}" for name, short in _QUERIES.items()},
        "attention.output.dense": "attention.o_proj",
    },
    extra_tensors={
        "vision_tower.layernorm.weight": (("vision",), 1.0),
        "vision_tower.layernorm.bias": (("vision",), 0.0),
        "vision_tower.embeddings.mask_token": (("one", "vision"), 0.0),
    },
)
_BY_ENCODER = {"clip_vision_model": WITH_CLIP, "dinov2": WITH_DINOV2, "siglip_vision_model": WITH_SIGLIP}


def llava_table(config: LlavaConfig) -> CheckpointTable[LlavaConfig]:
    """The checkpoint table of LLaVA-1.5 with the configuration's kind of encoder."""
    return _BY_ENCODER[config.vision.kind]
