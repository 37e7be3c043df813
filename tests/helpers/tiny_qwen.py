"""Tiny random Qwen2.5-VL models in torch, as checkpoint folders with tokenizer and image processor."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from mars_jax.data.images import load_rgb
from tests.helpers import tiny_data

IMAGE_TOKEN_ID = tiny_data.IMAGE_TOKEN_ID
CHAT_TEMPLATE = tiny_data.TYPED_CHATML.replace("<image>\n", "<|vision_start|><image><|vision_end|>")


def torch_model(
    seed: int = 0, text: dict[str, Any] | None = None, vision: dict[str, Any] | None = None
) -> transformers.Qwen2_5_VLForConditionalGeneration:
    text_config = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 300,
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    } | (text or {})
    vision_config = {
        "depth": 3,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_heads": 2,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": text_config["hidden_size"],
        "window_size": 56,
        "fullatt_block_indexes": [1],
    } | (vision or {})
    config = transformers.Qwen2_5_VLConfig(
        text_config=text_config,
        vision_config=vision_config,
        image_token_id=IMAGE_TOKEN_ID,
        video_token_id=299,
        vision_start_token_id=298,
        vision_end_token_id=297,
        tie_word_embeddings=text_config["tie_word_embeddings"],
    )
    config._attn_implementation = "eager"
    model = transformers.Qwen2_5_VLForConditionalGeneration(config).eval()
    # The library's own initialisation is so small that a wrong norm or bias would hide within the tolerance.
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, 0.15, generator=generator)
            if "norm" in name or "ln_q" in name:
                parameter.add_(1.0)
    return model


def checkpoint(directory: Path, model: transformers.PreTrainedModel) -> Path:
    """The folder of a model, with a tokenizer and an image processor for small pictures."""
    model.save_pretrained(directory)
    tiny_data.tokenizer(CHAT_TEMPLATE).save_pretrained(directory)
    vision = model.config.vision_config
    Qwen2VLImageProcessorPil(
        size={"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 20},
        patch_size=vision.patch_size,
        merge_size=vision.spatial_merge_size,
        temporal_patch_size=vision.temporal_patch_size,
    ).save_pretrained(directory)
    return directory


class Case(NamedTuple):
    """The same batch for both sides, made from files by each side's own processing."""

    batch: dict[str, Any]
    torch_inputs: dict[str, torch.Tensor]
    mask: np.ndarray


def case(directory: Path, checkpoint_directory: Path) -> Case:
    """Records of `tiny_data.conversations` as our batch, and as the inputs of transformers' model."""
    records, batch, mask = tiny_data.batch(tiny_data.conversations(directory), checkpoint_directory)
    pictures = [load_rgb(path) for record in records for path in record.images]
    processor = Qwen2VLImageProcessorPil.from_pretrained(checkpoint_directory)
    theirs = dict(processor(pictures, return_tensors="np"))
    theirs |= {"input_ids": batch["tokens"].astype(np.int64), "attention_mask": mask.astype(np.int64)}
    theirs["mm_token_type_ids"] = (batch["tokens"] == IMAGE_TOKEN_ID).astype(np.int32)
    return Case(batch, {name: torch.from_numpy(np.asarray(value)) for name, value in theirs.items()}, mask)
