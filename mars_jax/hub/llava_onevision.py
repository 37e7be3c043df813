"""The table of LLaVA-OneVision's checkpoints. Three key layouts are in circulation, of which one is the hub's own:

    hub files, transformers 4    language_model.model.layers.0...        vision_tower.vision_model.encoder...
    in memory, transformers 5    model.language_model.layers.0...        model.vision_tower.encoder...
    saved by transformers 5      language_model.model.layers.0...        vision_tower.encoder...

>>> FAMILY.hub_key("model.vision_tower.encoder.layers.0.mlp.fc1.weight")
'vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight'
>>> FAMILY.hub_key("lm_head.weight")
'language_model.lm_head.weight'
>>> FAMILY.memory_key("language_model.model.layers.0.mlp.up_proj")
'model.language_model.layers.0.mlp.up_proj'
"""

import re

from mars_jax.hub.tables import HEAD_PATH, Family, ModuleKeys, Row, decoder_dimensions, decoder_rows, linear
from mars_jax.models.configs import LlavaOnevisionConfig

_VISION = "vision_tower.vision_model"
_LAYER = f"{_VISION}.encoder.layers.{{layer}}"
_PROJECTOR = "multi_modal_projector"
_HEAD_KEY = "language_model.lm_head.weight"

# Stored, but never read by the model: the encoder is used up to the state before its last norm.
_UNUSED = re.compile(rf"{re.escape(_VISION)}\.(post_layernorm|head)\..*|.*\.position_ids|.*\.rotary_emb\.inv_freq")
_LAYER_OF_VISION = re.compile(rf"{re.escape(_VISION)}\.encoder\.layers\.(\d+)\..*")


def _layer_norm(path: str, key: str) -> tuple[Row, ...]:
    return Row(f"{path}/scale", f"{key}.weight", ("vision",)), Row(f"{path}/bias", f"{key}.bias", ("vision",))


def _dimensions(config: LlavaOnevisionConfig) -> dict[str, int]:
    vision = config.vision
    return decoder_dimensions(config.text) | {
        "pixels": 3 * vision.patch_size**2,
        "positions": vision.num_patches,
        "vision": vision.hidden_size,
        "vision_ffn": vision.intermediate_size,
    }


def _absent(config: LlavaOnevisionConfig) -> set[str]:
    biases = set() if config.projector_bias else {f"projector/linear_{number}/bias" for number in (1, 2)}
    return biases | ({HEAD_PATH} if config.text.tie_word_embeddings else set())


def _unused(key: str, config: LlavaOnevisionConfig) -> bool:
    """Norms and heads past the hidden state that the model reads, and buffers."""
    layer = _LAYER_OF_VISION.fullmatch(key)
    if layer:
        return config.num_vision_layers_used <= int(layer[1]) < config.vision.num_layers
    return bool(_UNUSED.fullmatch(key))


FAMILY = Family(
    title="LLaVA-OneVision",
    auto_class="LlavaOnevisionForConditionalGeneration",
    rows=(
        Row(
            "vision/patch_embed/kernel", f"{_VISION}.embeddings.patch_embedding.weight", ("pixels", "vision"), "patches"
        ),
        Row("vision/patch_embed/bias", f"{_VISION}.embeddings.patch_embedding.bias", ("vision",)),
        Row("vision/position_embed", f"{_VISION}.embeddings.position_embedding.weight", ("positions", "vision")),
        *_layer_norm("vision/layers/layer_norm1", f"{_LAYER}.layer_norm1"),
        *_layer_norm("vision/layers/layer_norm2", f"{_LAYER}.layer_norm2"),
        *linear("vision/layers/self_attn/q_proj", f"{_LAYER}.self_attn.q_proj", "vision", "vision"),
        *linear("vision/layers/self_attn/k_proj", f"{_LAYER}.self_attn.k_proj", "vision", "vision"),
        *linear("vision/layers/self_attn/v_proj", f"{_LAYER}.self_attn.v_proj", "vision", "vision"),
        *linear("vision/layers/self_attn/out_proj", f"{_LAYER}.self_attn.out_proj", "vision", "vision"),
        *linear("vision/layers/mlp/fc1", f"{_LAYER}.mlp.fc1", "vision", "vision_ffn"),
        *linear("vision/layers/mlp/fc2", f"{_LAYER}.mlp.fc2", "vision_ffn", "vision"),
        *linear("projector/linear_1", f"{_PROJECTOR}.linear_1", "vision", "text"),
        *linear("projector/linear_2", f"{_PROJECTOR}.linear_2", "text", "text"),
        Row("image_newline", "image_newline", ("text",)),
        *decoder_rows("language_model.model", _HEAD_KEY),
    ),
    dimensions=_dimensions,
    absent=_absent,
    stored_patches=lambda config: (3, config.vision.patch_size, config.vision.patch_size),
    to_hub=(
        (re.compile(r"^model\.language_model\."), "language_model.model."),
        (re.compile(r"^model\.(?=(vision_tower|multi_modal_projector|image_newline)\b)"), ""),
        (re.compile(r"^lm_head\."), "language_model.lm_head."),
        (re.compile(r"^vision_tower\.(?!vision_model\.)"), "vision_tower.vision_model."),
    ),
    # `vision_model.` stays: transformers 5.6 and later take the longer name, earlier ones take no other.
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
    # transformers builds this norm although the model never reads it, and warns where it is missing.
    extra_tensors={
        f"{_VISION}.post_layernorm.weight": ("vision", 1.0),
        f"{_VISION}.post_layernorm.bias": ("vision", 0.0),
    },
    serving="vLLM takes no LoRA adapter for LLaVA-OneVision (0.33): serve the merged checkpoint of the same run there.",
)
