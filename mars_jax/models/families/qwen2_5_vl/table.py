"""Checkpoint table of Qwen2.5-VL. Two key layouts are published:

    hub files, saved by any version   model.layers.0...                  visual.blocks.0...         lm_head
    in memory, transformers 4.52 on   model.language_model.layers.0...   model.visual.blocks.0...   lm_head

>>> TABLE.hub_key("model.visual.blocks.0.attn.qkv.weight")
'visual.blocks.0.attn.qkv.weight'
>>> TABLE.memory_key("model.layers.0.mlp.up_proj")
'model.language_model.layers.0.mlp.up_proj'
"""

import re

from mars_jax.models.families.qwen2_5_vl.config import Qwen25VlConfig
from mars_jax.models.families.tables import (
    CheckpointTable,
    ModuleKeys,
    Row,
    absent_from_decoder,
    decoder_dimensions,
    decoder_rows,
    linear,
)

_LAYER = "visual.blocks.{layer}"
_MERGER = "visual.merger"
_UNUSED = re.compile(r".*rotary(_pos)?_emb\.inv_freq")


def _dimensions(config: Qwen25VlConfig) -> dict[str, int]:
    vision = config.vision
    return decoder_dimensions(config.text) | {
        "pixels": vision.patch_values,
        "vision": vision.hidden_size,
        "vision_qkv": 3 * vision.hidden_size,
        "vision_ffn": vision.intermediate_size,
        "group": vision.hidden_size * vision.group,
    }


def _stored_patches(config: Qwen25VlConfig) -> tuple[int, ...]:
    vision = config.vision
    return 3, vision.temporal_patch_size, vision.patch_size, vision.patch_size


TABLE: CheckpointTable[Qwen25VlConfig] = CheckpointTable(
    auto_class="Qwen2_5_VLForConditionalGeneration",
    rows=(
        Row("vision/patch_embed/kernel", "visual.patch_embed.proj.weight", ("pixels", "vision"), "patches"),
        Row("vision/layers/norm1/scale", f"{_LAYER}.norm1.weight", ("vision",)),
        Row("vision/layers/norm2/scale", f"{_LAYER}.norm2.weight", ("vision",)),
        *linear("vision/layers/self_attn/qkv", f"{_LAYER}.attn.qkv", "vision", "vision_qkv"),
        *linear("vision/layers/self_attn/proj", f"{_LAYER}.attn.proj", "vision", "vision"),
        *linear("vision/layers/mlp/gate_proj", f"{_LAYER}.mlp.gate_proj", "vision", "vision_ffn"),
        *linear("vision/layers/mlp/up_proj", f"{_LAYER}.mlp.up_proj", "vision", "vision_ffn"),
        *linear("vision/layers/mlp/down_proj", f"{_LAYER}.mlp.down_proj", "vision_ffn", "vision"),
        Row("projector/norm/scale", f"{_MERGER}.ln_q.weight", ("vision",)),
        *linear("projector/linear_1", f"{_MERGER}.mlp.0", "group", "group"),
        *linear("projector/linear_2", f"{_MERGER}.mlp.2", "group", "text"),
        *decoder_rows("model", "lm_head.weight"),
    ),
    dimensions=_dimensions,
    absent=lambda config: absent_from_decoder(config.text),
    stored_patches=_stored_patches,
    to_hub=(
        (re.compile(r"^model\.language_model\."), "model."),
        (re.compile(r"^model\.visual\."), "visual."),
    ),
    to_memory=(
        (re.compile(r"^model\."), "model.language_model."),
        (re.compile(r"^visual\."), "model.visual."),
    ),
    unused=lambda key, _: bool(_UNUSED.fullmatch(key)),
    head_key="lm_head.weight",
    modules={
        "vision": ModuleKeys(f"{_LAYER}.", r"visual\.blocks\.", r".*visual\.blocks\..*"),
        "projector": ModuleKeys(f"{_MERGER}.", r"visual\.merger\.", r".*visual\.merger\..*"),
        "llm": ModuleKeys(
            "model.layers.{layer}.", r"(language_model|model)\.layers\.", r".*(language_model|model)\.layers\..*"
        ),
    },
    layouts="model.layers., model.language_model., visual. or model.visual.",
    extra_tensors={},
    vllm="adapters",
    loading=(
        "transformers 5.3 to 5.5 (until 5.5.4) compute wrong positions for pictures of this family, with and without "
        "an adapter (its issue 45325)."
    ),
)
