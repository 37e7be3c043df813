"""The bases of `adapter_matrix`: tiny random checkpoints as they are on the hub, a batch with pictures, our logits.

Configurations are written as transformers 4 writes them, which every version reads.
"""

import json
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks.lib.child import Document
from mars_jax.adapters.lora import LORA
from mars_jax.adapters.targets import Target, Targets
from mars_jax.adapters.tree import pad
from mars_jax.data.examples import ExampleSource
from mars_jax.data.preprocessor import load_preprocessor
from mars_jax.data.records import load_records
from mars_jax.data.shapes import plan_shapes
from mars_jax.hub.read import read_checkpoint
from mars_jax.hub.write import write_checkpoint
from mars_jax.job.export import torch_inputs
from mars_jax.models.configs import ModelConfig
from mars_jax.models.families.registry import build_model, checkpoint_table, model_config, parameters
from mars_jax.runtime.trees import Tree, unflatten
from tests.helpers import tiny_data

MOST = 8
"""The largest rank."""

_DEVIATION = 0.15  # transformers' own start is so small that a lost norm or bias would hide within the tolerance
_PICTURES = ((60, 90), (200, 57))
_TEXT: Document = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
_VISION: Document = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
# transformers 4 finds Qwen's pictures by the token before them.
_VISION_START, _VISION_END = "<|vision_start|>", "<|vision_end|>"
_QWEN_TEMPLATE = tiny_data.TYPED_CHATML.replace("<image>\n", f"{_VISION_START}<image>{_VISION_END}")
_CROP = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
_RESIZE = {"size": {"height": 28, "width": 28}}


def _llava(vision: Document, decoder: str, layer: int, strategy: str, processor: Document) -> tuple[Document, Document]:
    return {
        "model_type": "llava",
        "image_token_index": tiny_data.IMAGE_TOKEN_ID,
        "vision_feature_layer": layer,
        "vision_feature_select_strategy": strategy,
        "text_config": {"model_type": decoder, **_TEXT},
        "vision_config": {**_VISION, **vision},
    }, processor


BASES: dict[str, tuple[Document, Document]] = {
    "LLaVA, CLIP, Llama": _llava(
        {"model_type": "clip_vision_model"},
        "llama",
        -2,
        "default",
        {"image_processor_type": "CLIPImageProcessor", **_CROP},
    ),
    "LLaVA, SigLIP, Qwen2": _llava(
        {"model_type": "siglip_vision_model", "vision_use_head": False},
        "qwen2",
        -1,
        "full",
        {"image_processor_type": "SiglipImageProcessor", **_RESIZE},
    ),
    "LLaVA, DINOv2, Llama": _llava(
        {"model_type": "dinov2", "mlp_ratio": 2},
        "llama",
        -1,
        "default",
        {"image_processor_type": "BitImageProcessor", **_CROP},
    ),
    "LLaVA-OneVision": (
        {
            "model_type": "llava_onevision",
            "image_token_index": tiny_data.IMAGE_TOKEN_ID,
            "video_token_index": _TEXT["vocab_size"] - 1,
            "image_grid_pinpoints": tiny_data.PINPOINTS,
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
            "tie_word_embeddings": False,
            "text_config": {"model_type": "qwen2", **_TEXT},
            "vision_config": {"model_type": "siglip_vision_model", "vision_use_head": False, **_VISION},
        },
        {
            "image_processor_type": "LlavaOnevisionImageProcessor",
            "image_grid_pinpoints": tiny_data.PINPOINTS,
            **_RESIZE,
        },
    ),
    "Qwen2.5-VL": (
        {
            "model_type": "qwen2_5_vl",
            **_TEXT,
            "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
            "image_token_id": tiny_data.IMAGE_TOKEN_ID,
            "video_token_id": _TEXT["vocab_size"] - 1,
            "vision_config": {
                "model_type": "qwen2_5_vl",
                "depth": 3,
                "hidden_size": 24,
                "intermediate_size": 40,
                "num_heads": 2,
                "patch_size": 14,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
                "out_hidden_size": _TEXT["hidden_size"],
                "window_size": 56,
                "fullatt_block_indexes": [1],
            },
        },
        {
            "image_processor_type": "Qwen2VLImageProcessor",
            "size": {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 20},
            "patch_size": 14,
            "merge_size": 2,
            "temporal_patch_size": 2,
        },
    ),
}


class Base(NamedTuple):
    """A checkpoint on disk, read by us, with a batch for both sides."""

    directory: Path
    config: ModelConfig
    params: Tree
    batch: dict[str, np.ndarray]  # ours
    inputs: dict[str, np.ndarray]  # of transformers' model
    program: Any

    def logits(self, adapters: Tree) -> np.ndarray:
        """Ours [B, T, V]. Adapters of any modules and ranks up to MOST go through one program."""
        targets = targets_of(self.config)
        padded = pad(adapters, targets, {target.module: MOST for target in targets.values()})
        return np.asarray(self.program({"params": self.params, LORA.name: padded}, self.batch))


def make_base(folder: Path, name: str) -> Base:
    """Writes a base with random weights, and reads it."""
    config_json, processor = BASES[name]
    directory = folder / "base"
    _write(directory, config_json, processor)
    config, params = read_checkpoint(directory, "float32")
    for number, size in enumerate(_PICTURES):
        tiny_data.save_picture(folder / f"{number}.png", *size, seed=number)
    asked = [("0.png", "what shape?", "a red square"), ("1.png", "is this what it is? why?", "it is")]
    items = [
        {
            "id": image,
            "image": image,
            "conversations": [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}],
        }
        for image, question, answer in asked
    ]
    (folder / "records.json").write_text(json.dumps(items))
    records, preprocessor = load_records(folder / "records.json", folder), load_preprocessor(directory)
    source = ExampleSource(records, preprocessor, plan_shapes(records, preprocessor, 10**6).shapes)
    batch = {name: np.stack([source[i][name] for i in range(len(records))]) for name in source[0]}
    # Every base is compiled to run a few times: the time goes to the compiler.
    program = jax.jit(
        partial(build_model(config).apply, method="logits"),
        compiler_options={"xla_backend_optimization_level": 0},
    )
    inputs = torch_inputs(records, batch, preprocessor)
    if "positions" in batch:
        inputs["position_ids"] = np.moveaxis(batch["positions"], -1, 0).astype(np.int64)
    return Base(directory, config, params, batch, inputs, program)


def targets_of(config: ModelConfig) -> Targets:
    """The linears that take an adapter, by their paths."""
    shapes = {parameter.path: parameter.shape for parameter in parameters(config)}
    targets = {}
    for path in checkpoint_table(config).linears:
        *layers, d_in, d_out = shapes[f"{path}/kernel"]
        targets[path] = Target(path.split("/")[0], layers[0] if layers else None, d_in, d_out)
    return targets


def _write(directory: Path, config_json: Document, processor: Document) -> None:
    is_qwen = config_json["model_type"] == "qwen2_5_vl"
    tokenizer = tiny_data.tokenizer(_QWEN_TEMPLATE if is_qwen else tiny_data.TYPED_CHATML)
    if is_qwen:
        tokenizer.add_tokens([_VISION_START, _VISION_END], special_tokens=True)
        start, end = tokenizer.convert_tokens_to_ids([_VISION_START, _VISION_END])
        config_json = config_json | {"vision_start_token_id": start, "vision_end_token_id": end}
    rng = np.random.default_rng(0)
    whole = config_json | ({"vision_feature_layer": -1} if config_json["model_type"] == "llava" else {})
    flat = {}
    for parameter in parameters(model_config(whole)):
        is_norm = parameter.path.endswith("/scale")
        flat[parameter.path] = rng.normal(float(is_norm), _DEVIATION, parameter.shape).astype(np.float32)
    write_checkpoint(directory, whole, unflatten(flat), "float32")
    # All layers are stored, also those past the state that LLaVA reads.
    (directory / "config.json").write_text(json.dumps(config_json))
    (directory / "preprocessor_config.json").write_text(json.dumps(processor))
    tokenizer.save_pretrained(directory)
